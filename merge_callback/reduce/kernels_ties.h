/* The passes of TIES, for one instruction set; included by kernels.c after kernels_pass.h.
 *
 * They use the compiler's own vectors, whose comparisons give masks. Operations are in the order of the sources,
 * and each is rounded separately, so the results have the same bits as with PyTorch's own operations. */

typedef float NAME(Floats) __attribute__((vector_size(4 * WIDE)));
typedef int32_t NAME(Ints) __attribute__((vector_size(4 * WIDE)));

/* A group of a source, or the `count` elements that are left of it, widened. */
INLINE void NAME(widen)(NAME(Floats) *x, const char *data, int64_t at, int32_t dtype, int64_t count) {
    NAME(Lanes) lanes[VECTORS];
    NAME(load_group)(lanes, data + at * width(dtype), dtype, count);
    memcpy(x, lanes, sizeof lanes);
}

/* `x` in places whose mask is set, else 0. */
INLINE NAME(Floats) NAME(where)(NAME(Ints) mask, NAME(Floats) x) { return (NAME(Floats))(mask & (NAME(Ints))x); }

INLINE NAME(Floats) NAME(absolute)(NAME(Floats) x) { return (NAME(Floats))((NAME(Ints))x & 0x7fffffff); }

/* The same number in all places. */
INLINE NAME(Floats) NAME(all)(float x) { return x - (NAME(Floats)){0}; }

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
        NAME(Floats) below = NAME(all)(entries->below), at_most = NAME(all)(entries->at_most);
        int64_t left = entries->end - at;
        int32_t before_end = left < 0 ? 0 : smaller(left, GROUP);
        UNROLL for (int v = 0; v < PARTS; v++) {
            NAME(Ints) early = index + WIDE * v < before_end;
            NAME(Floats) cut = NAME(where)(early, below) + NAME(where)(~early, at_most);
            NAME(Floats) entry = x[v] - initial[v];
            entry = NAME(where)(~(NAME(absolute)(entry) <= cut), entry);
            /* NaN is neither positive nor negative: it goes into both sums, as with clamp(). */
            positive[v] += NAME(where)(~(entry < 0), entry);
            negative[v] += NAME(where)(~(entry > 0), entry);
            ayes[v] -= ~(entry <= 0); /* a set mask is -1 */
            noes[v] -= ~(entry >= 0);
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

/* Adds up a mask's places that are set, each for 1. */
INLINE int64_t NAME(number)(NAME(Ints) counts) {
    int64_t sum = 0;
    for (int k = 0; k < WIDE; k++) sum -= counts[k];
    return sum;
}

/* One group's magnitudes; returns how many of those between are written. */
INLINE int64_t NAME(split_group)(
    const Split *split, int64_t at, int64_t count, NAME(Ints) *above, NAME(Ints) *at_high, NAME(Ints) *at_low,
    int32_t *between) {
    NAME(Floats) theta[PARTS], initial[PARTS];
    NAME(Ints) bits[PARTS];
    int64_t found = 0;
    NAME(widen)(theta, split->theta, at, split->theta_dtype, count);
    NAME(widen)(initial, split->initial, at, split->initial_dtype, count);
    UNROLL for (int v = 0; v < PARTS; v++) bits[v] = (NAME(Ints))NAME(absolute)(theta[v] - initial[v]);
    if (count < GROUP)
        memset((int32_t *)bits + count, 0xff, 4 * (GROUP - count)); /* -1 is below every magnitude */
    UNROLL for (int v = 0; v < PARTS; v++) {
        *above += bits[v] > split->high;
        *at_high += bits[v] == split->high;
        *at_low += bits[v] == split->low;
        NAME(Ints) inside = (bits[v] > split->low) & (bits[v] < split->high);
        for (uint32_t set = NAME(set)(&inside); set; set &= set - 1)
            between[found++] = ((int32_t *)(bits + v))[__builtin_ctz(set)];
    }
    return found;
}

/* Counts the magnitudes of a task vector above `high`, at it, and at `low` if that is lower; writes those
 * between, as bits, and returns how many they are. `between` has room for all elements. */
static TARGET int64_t NAME(split)(const Split *split, int64_t *counts, int32_t *between) {
    NAME(Ints) above = {0}, at_high = {0}, at_low = {0};
    int64_t found = 0, at = 0;
    for (; at + GROUP <= split->size; at += GROUP)
        found += NAME(split_group)(split, at, GROUP, &above, &at_high, &at_low, between + found);
    if (at < split->size)
        found += NAME(split_group)(split, at, split->size - at, &above, &at_high, &at_low, between + found);
    counts[0] = NAME(number)(above);
    counts[1] = NAME(number)(at_high);
    counts[2] = split->low < split->high ? NAME(number)(at_low) : 0;
    return found;
}
