/* The passes of TIES, for one instruction set; included by kernels.c after kernels_pass.h.
 *
 * They use the compiler's own vectors, whose comparisons give masks. Operations are in the order of the sources,
 * and each is rounded separately, so the results have the same bits as with PyTorch's own operations. */

typedef float NAME(Floats) __attribute__((vector_size(4 * WIDE)));
typedef int32_t NAME(Ints) __attribute__((vector_size(4 * WIDE)));

/* A group of a source, or the `count` elements that are left of it, widened. */
INLINE void NAME(widen)(void *x, const char *data, int64_t at, int32_t dtype, int64_t count) {
    NAME(Lanes) lanes[VECTORS];
    NAME(load_group)(lanes, data + at * width(dtype), dtype, count, AHEAD);
    memcpy(x, lanes, sizeof lanes);
}

/* `x` in places whose mask is set, else 0. */
INLINE NAME(Floats) NAME(where)(NAME(Ints) mask, NAME(Floats) x) { return (NAME(Floats))(mask & (NAME(Ints))x); }

INLINE NAME(Floats) NAME(absolute)(NAME(Floats) x) { return (NAME(Floats))((NAME(Ints))x & 0x7fffffff); }

/* The same number in all places. */
INLINE NAME(Floats) NAME(all)(float x) { return x - (NAME(Floats)){0}; }

/* What is trimmed up to a magnitude; nothing if that is NaN. */
INLINE NAME(Floats) NAME(cut)(float magnitude) { return NAME(all)(magnitude >= 0 ? magnitude : 0); }

/* Adds the entries above a cut to a sum, or those below its negative, and counts them. No cut is negative, so this
 * also tells the sign. NaN has neither: it goes into both sums, as with clamp(). What is trimmed adds 0. */
#if LANES == 16
INLINE void NAME(add_above)(NAME(Floats) *sum, NAME(Ints) *number, NAME(Floats) entry, NAME(Floats) cut) {
    __mmask16 set = _mm512_cmp_ps_mask(entry, cut, _CMP_NLE_UQ);
    *sum = _mm512_mask_add_ps(*sum, set, *sum, entry);
    *number = (NAME(Ints))_mm512_mask_add_epi32((__m512i)*number, set, (__m512i)*number, _mm512_set1_epi32(1));
}
INLINE void NAME(add_below)(NAME(Floats) *sum, NAME(Ints) *number, NAME(Floats) entry, NAME(Floats) cut) {
    __mmask16 set = _mm512_cmp_ps_mask(entry, -cut, _CMP_NGE_UQ);
    *sum = _mm512_mask_add_ps(*sum, set, *sum, entry);
    *number = (NAME(Ints))_mm512_mask_add_epi32((__m512i)*number, set, (__m512i)*number, _mm512_set1_epi32(1));
}
#else
INLINE void NAME(add_above)(NAME(Floats) *sum, NAME(Ints) *number, NAME(Floats) entry, NAME(Floats) cut) {
    NAME(Ints) set = ~(entry <= cut);
    *sum += NAME(where)(set, entry);
    *number -= set; /* a set mask is -1 */
}
INLINE void NAME(add_below)(NAME(Floats) *sum, NAME(Ints) *number, NAME(Floats) entry, NAME(Floats) cut) {
    NAME(Ints) set = ~(entry >= -cut);
    *sum += NAME(where)(set, entry);
    *number -= set;
}
#endif

/* Trims, elects and averages one group. */
INLINE void NAME(elect_group)(const Election *election, int64_t at, int64_t count, int stream) {
    NAME(Floats) initial[PARTS], x[PARTS], positive[PARTS], negative[PARTS];
    NAME(Ints) ayes[PARTS], noes[PARTS], index;
    for (int k = 0; k < WIDE; k++) index[k] = k;
    UNROLL for (int v = 0; v < PARTS; v++) {
        positive[v] = negative[v] = (NAME(Floats)){0};
        ayes[v] = noes[v] = (NAME(Ints)){0};
    }
    NAME(widen)(initial, election->initial, at, election->initial_dtype, count);
    for (const Entries *entries = election->entries; entries < election->entries + election->count; entries++) {
        NAME(widen)(x, entries->data, at, entries->dtype, count);
        int64_t left = entries->end - at;
        NAME(Floats) cut = NAME(cut)(left > 0 ? entries->below : entries->at_most);
        UNROLL for (int v = 0; v < PARTS; v++) x[v] -= initial[v];
        if (left > 0 && left < GROUP) {
            NAME(Floats) at_most = NAME(cut)(entries->at_most);
            UNROLL for (int v = 0; v < PARTS; v++) {
                NAME(Ints) late = index + WIDE * v >= (int32_t)left;
                x[v] = NAME(where)(~(late & (NAME(absolute)(x[v]) <= at_most)), x[v]);
            }
        }
        UNROLL for (int v = 0; v < PARTS; v++) {
            NAME(add_above)(&positive[v], &ayes[v], x[v], cut);
            NAME(add_below)(&negative[v], &noes[v], x[v], cut);
        }
    }
    NAME(Floats) one = NAME(all)(1);
    UNROLL for (int v = 0; v < PARTS; v++) {
        /* Products instead of masks: infinite entries of both signs have to give NaN, as in PyTorch. */
        NAME(Floats) elected = NAME(where)(positive[v] + negative[v] >= 0, one), lost = 1 - elected;
        NAME(Floats) number = __builtin_convertvector(ayes[v], NAME(Floats)) * elected;
        number += __builtin_convertvector(noes[v], NAME(Floats)) * lost;
        number += NAME(where)(number == 0, one);
        x[v] = (positive[v] * elected + negative[v] * lost) / number * election->scale + initial[v];
    }
    NAME(Lanes) lanes[VECTORS];
    memcpy(lanes, x, sizeof lanes);
    NAME(store_group)(lanes, election->out + at * width(election->out_dtype), election->out_dtype, count, stream);
}

static TARGET void NAME(elect_chunks)(Election *election) {
    int stream = streams(election->out, election->out_dtype, election->size);
    for (;;) {
        int64_t at = CHUNK * __atomic_fetch_add(&election->next, 1, __ATOMIC_RELAXED);
        if (at >= election->size)
            break;
        int64_t stop = smaller(at + CHUNK, election->size);
        for (; at + GROUP <= stop; at += GROUP) NAME(elect_group)(election, at, GROUP, stream);
        if (at < stop)
            NAME(elect_group)(election, at, stop - at, 0);
    }
    NAME(fence)();
}

/* Counts a whole group of one task vector, and picks what lies in its bracket, ends included. */
INLINE void NAME(tally_group)(Tally *tally, const NAME(Lanes) *initial, int64_t at) {
    NAME(Lanes) theta[VECTORS];
    NAME(Bits) below = NAME(same)(tally->low - 1), high = NAME(same)(tally->high);
    int32_t *start = tally->between + tally->found + tally->picked, *end = start;
    int64_t reach = 0;
    NAME(load_group)(theta, tally->theta + at * width(tally->dtype), tally->dtype, GROUP, AHEAD);
    UNROLL for (int v = 0; v < VECTORS; v++) {
        NAME(Bits) bits = NAME(magnitude)(theta[v] - initial[v]);
        NAME(Mask) set = NAME(above)(bits, below);
        reach += NAME(number)(set);
        end += NAME(pick)(end, bits, NAME(up_to)(set, bits, high));
    }
    tally->picked += end - start;
    tally->above += reach - (end - start);
}

/* The same for the `count` elements that are left at the end. */
static TARGET void NAME(tally_rest)(Tally *tally, const float *initial, int64_t at, int64_t count) {
    float theta[GROUP];
    NAME(widen)(theta, tally->theta, at, tally->dtype, count);
    for (int64_t i = 0; i < count; i++) {
        float entry = theta[i] - initial[i];
        int32_t bits;
        memcpy(&bits, &entry, 4);
        bits &= 0x7fffffff;
        tally->above += bits > tally->high;
        if (bits >= tally->low && bits <= tally->high)
            tally->between[tally->found + tally->picked++] = bits;
    }
}

/* Counts the ends of the bracket among what was picked of a block, and leaves only what lies between. */
static TARGET void NAME(tally_ends)(Tally *tally, Mark *mark) {
    NAME(Bits) low = NAME(same)(tally->low), high = NAME(same)(tally->high);
    int32_t *picked = tally->between + tally->found, *end = picked;
    int64_t at_low = 0, at_high = 0;
    memset(picked + tally->picked, 0xff, 4 * LANES); /* -1, which no magnitude is */
    for (int64_t i = 0; i < tally->picked; i += LANES) {
        NAME(Bits) bits;
        memcpy(&bits, picked + i, sizeof bits);
        at_low += NAME(number)(NAME(equal)(bits, low));
        at_high += NAME(number)(NAME(equal)(bits, high));
        end += NAME(pick)(end, bits, NAME(above)(bits, low) & NAME(above)(high, bits));
    }
    if (tally->low == tally->high)
        at_low = 0;
    *mark = (Mark){at_high, at_low, end - picked};
    tally->at_low += at_low;
    tally->at_high += at_high;
    tally->found += end - picked;
    tally->picked = 0;
}

/* All task vectors, group by group. */
static TARGET void NAME(tally)(const Census *census) {
    Tally *last = census->tallies + census->count;
    for (int64_t at = 0; at < census->size;) {
        int64_t block = at / BLOCK, stop = smaller(at + BLOCK, census->size);
        for (; at + GROUP <= stop; at += GROUP) {
            NAME(Lanes) initial[VECTORS];
            int32_t dtype = census->initial_dtype;
            NAME(load_group)(initial, census->initial + at * width(dtype), dtype, GROUP, AHEAD);
            for (Tally *tally = census->tallies; tally < last; tally++) NAME(tally_group)(tally, initial, at);
        }
        if (at < stop) {
            float initial[GROUP];
            NAME(widen)(initial, census->initial, at, census->initial_dtype, stop - at);
            for (Tally *tally = census->tallies; tally < last; tally++)
                NAME(tally_rest)(tally, initial, at, stop - at);
            at = stop;
        }
        for (Tally *tally = census->tallies; tally < last; tally++) NAME(tally_ends)(tally, tally->marks + block);
    }
}
