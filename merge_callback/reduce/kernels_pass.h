/* The pass itself, for one instruction set: kernels.c defines NAME, TARGET, LANES and the operations on
 * LANES elements, and includes this once for each. */

/* Asks for the memory that a source's group will need in a while. The processor does so itself, but not for
 * dozens of sources at once, nor while squares are summed. Into the second-level cache: sources that begin at
 * the same place of a page share a few lines of the first level, and would drive each other out before they are
 * used, which made a sum of ten fp32 sources take 1.5 times as long, of 64 2.4 times. It may go beyond the end,
 * where it does nothing. */
INLINE void NAME(fetch_ahead)(const char *data, int64_t size, int64_t ahead) {
    for (int64_t line = 0; line < size; line += 64) __builtin_prefetch(data + ahead + line, 0, 2);
}

/* Widens one group of a source, or the `count` elements that are left of it, and zeros. Only a vector's
 * registers are named: `x` never reaches memory. */
INLINE void NAME(load_group)(NAME(Lanes) *x, const char *data, int32_t dtype, int64_t count, int64_t ahead) {
    char padded[4 * GROUP];
    if (count < GROUP) {
        memset(padded, 0, sizeof padded);
        data = memcpy(padded, data, count * width(dtype));
    } else {
        NAME(fetch_ahead)(data, GROUP * width(dtype), ahead);
    }
    switch (dtype) {
    case FP32:
        UNROLL for (int v = 0; v < VECTORS; v++) x[v] = NAME(load_fp32)(data + 4 * LANES * v);
        break;
    case BF16:
        UNROLL for (int v = 0; v < VECTORS; v++) x[v] = NAME(load_bf16)(data + 2 * LANES * v);
        break;
    default:
        UNROLL for (int v = 0; v < VECTORS; v++) x[v] = NAME(load_fp16)(data + 2 * LANES * v);
    }
}

/* The one final cast. A streamed store goes past the caches: the line is not read before it is written. */
INLINE void NAME(store_whole_group)(const NAME(Lanes) *x, char *out, int32_t dtype, int stream) {
    if (dtype == FP32) {
        UNROLL for (int v = 0; v < VECTORS; v++) {
            if (stream)
                NAME(stream_fp32)(out + 4 * LANES * v, x[v]);
            else
                NAME(store_fp32)(out + 4 * LANES * v, x[v]);
        }
        return;
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
        NAME(Halves) half = dtype == BF16 ? NAME(to_bf16)(x[v]) : NAME(to_fp16)(x[v]);
        if (stream)
            NAME(stream_half)(out + 2 * LANES * v, half);
        else
            NAME(store_half)(out + 2 * LANES * v, half);
    }
}

INLINE void NAME(store_group)(const NAME(Lanes) *x, char *out, int32_t dtype, int64_t count, int stream) {
    char padded[4 * GROUP];
    if (count < GROUP) {
        NAME(store_whole_group)(x, padded, dtype, 0);
        memcpy(out, padded, count * width(dtype));
    } else {
        NAME(store_whole_group)(x, out, dtype, stream);
    }
}

/* Both sums of the elements from `at` on: a whole group of them, or the `count` that are left at the end. */
INLINE void NAME(sum_group)(const Pass *pass, int64_t at, int64_t count, float *contrasts, int stream) {
    NAME(Lanes) total[VECTORS], contrast[VECTORS], x[VECTORS];
    /* x·w − 0 is x·w with its sign even if that is 0: the first term is a product, as in PyTorch. */
    NAME(Lanes) none = NAME(spread)(pass->roles & WEIGHTED ? -0.0f : 0.0f);
    UNROLL for (int v = 0; v < VECTORS; v++) total[v] = contrast[v] = none;
    for (const Source *source = pass->sources; source < pass->sources + pass->count; source++) {
        NAME(load_group)(x, source->data + at * width(source->dtype), source->dtype, count, AHEAD);
        if (source->roles & WEIGHTED) {
            NAME(Lanes) weight = NAME(spread)(source->weight);
            UNROLL for (int v = 0; v < VECTORS; v++) total[v] = NAME(fma)(x[v], weight, total[v]);
        }
        if (source->roles & CONTRASTED) {
            NAME(Lanes) factor = NAME(spread)(source->factor);
            UNROLL for (int v = 0; v < VECTORS; v++) contrast[v] = NAME(fma)(x[v], factor, contrast[v]);
        }
    }
    if (pass->out)
        NAME(store_group)(total, pass->out + at * width(pass->out_dtype), pass->out_dtype, count, stream);
    if (pass->partials)
        UNROLL for (int v = 0; v < VECTORS; v++) NAME(store_fp32)(contrasts + LANES * v, contrast[v]);
}

/* Both sums of a block: into the output, and into `contrasts`. */
static TARGET void NAME(sum_block)(const Pass *pass, int64_t start, int64_t stop, float *contrasts, int stream) {
    int64_t at = start;
    if (stream)
        for (; at + GROUP <= stop; at += GROUP)
            NAME(sum_group)(pass, at, GROUP, contrasts + at - start, 1);
    else
        for (; at + GROUP <= stop; at += GROUP)
            NAME(sum_group)(pass, at, GROUP, contrasts + at - start, 0);
    if (at < stop)
        NAME(sum_group)(pass, at, stop - at, contrasts + at - start, 0);
}

/* In fp64, in which the square of an fp32 number is exact; in an order that depends only on `count`. */
static TARGET double NAME(sum_of_squares)(const float *x, int64_t count) {
    double lanes[32] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
        for (int k = 0; k < 32; k++) lanes[k] += (double)x[i + k] * x[i + k];
    for (int k = 0; i + k < count; k++) lanes[k] += (double)x[i + k] * x[i + k];
    for (int k = 0; k < 32; k++) sum += lanes[k];
    return sum;
}

/* Adds a block's squares to the partial sums of the segments it touches, from `segment` on; returns the last.
 *
 * Along the buffer each piece of a segment in a chunk comes with the next segment, or the next chunk, or
 * both: so the sum of the two numbers is the piece's alone. */
static TARGET int64_t NAME(add_squares)(
    const Pass *pass, int64_t start, int64_t stop, const float *contrasts, int64_t segment) {
    for (int64_t at = start; at < stop && segment < pass->segments; segment++) {
        int64_t end = smaller(pass->bounds[segment], stop);
        if (end > at)
            pass->partials[segment + start / CHUNK] += NAME(sum_of_squares)(contrasts + at - start, end - at);
        at = end;
        if (pass->bounds[segment] > stop)
            break;
    }
    return segment;
}

static TARGET void NAME(do_chunk)(const Pass *pass, int64_t chunk, int stream) {
    float contrasts[BLOCK];
    int64_t stop = smaller((chunk + 1) * CHUNK, pass->size);
    int64_t segment = pass->partials ? segment_at(pass, chunk * CHUNK) : 0;
    for (int64_t at = chunk * CHUNK; at < stop; at += BLOCK) {
        int64_t end = smaller(at + BLOCK, stop);
        NAME(sum_block)(pass, at, end, contrasts, stream);
        if (pass->partials)
            segment = NAME(add_squares)(pass, at, end, contrasts, segment);
    }
}

static TARGET void NAME(take_chunks)(Pass *pass) {
    int stream = streams(pass->out, pass->out_dtype, pass->size);
    for (;;) {
        int64_t chunk = __atomic_fetch_add(&pass->next, 1, __ATOMIC_RELAXED);
        if (chunk * CHUNK >= pass->size)
            break;
        NAME(do_chunk)(pass, chunk, stream);
    }
    NAME(fence)();
}

/* Vectors of a source that are widened at once for several sums, whose registers they share. */
#define FEW (LANES == 16 ? 4 : 2)
#define SIDE (FEW * LANES)

INLINE void NAME(load_side)(NAME(Lanes) *x, const char *data, int32_t dtype) {
    UNROLL for (int v = 0; v < FEW; v++)
        x[v] = dtype == FP32   ? NAME(load_fp32)(data + 4 * LANES * v)
               : dtype == BF16 ? NAME(load_bf16)(data + 2 * LANES * v)
                               : NAME(load_fp16)(data + 2 * LANES * v);
}

INLINE void NAME(store_side)(const NAME(Lanes) *x, char *out, int32_t dtype, int stream) {
    UNROLL for (int v = 0; v < FEW; v++) {
        if (dtype == FP32) {
            if (stream)
                NAME(stream_fp32)(out + 4 * LANES * v, x[v]);
            else
                NAME(store_fp32)(out + 4 * LANES * v, x[v]);
            continue;
        }
        NAME(Halves) half = dtype == BF16 ? NAME(to_bf16)(x[v]) : NAME(to_fp16)(x[v]);
        if (stream)
            NAME(stream_half)(out + 2 * LANES * v, half);
        else
            NAME(store_half)(out + 2 * LANES * v, half);
    }
}

/* `rows` sums from `first` on, of SIDE elements, or of the `count` that are left at the end. */
INLINE void NAME(sum_side)(const Sums *sums, int64_t first, int rows, int64_t at, int64_t count, float *contrasts) {
    NAME(Lanes) total[4][FEW], x[FEW];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < FEW; v++) total[r][v] = NAME(spread)(sums->starts[first + r]);
    const float *weights = sums->weights + first;
    for (const Source *source = sums->pass.sources; source < sums->pass.sources + sums->pass.count;
         source++, weights += sums->count) {
        const char *data = source->data + at * width(source->dtype);
        char padded[4 * SIDE];
        if (count < SIDE) {
            memset(padded, 0, sizeof padded);
            data = memcpy(padded, data, count * width(source->dtype));
        } else if (first == 0) {
            NAME(fetch_ahead)(data, SIDE * width(source->dtype), AHEAD);
        }
        NAME(load_side)(x, data, source->dtype);
        UNROLL for (int r = 0; r < rows; r++)
            if (weights[r] != 0) {
                NAME(Lanes) weight = NAME(spread)(weights[r]);
                UNROLL for (int v = 0; v < FEW; v++) total[r][v] = NAME(fma)(x[v], weight, total[r][v]);
            }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        char *out = sums->outs[first + r];
        int32_t dtype = out ? sums->out_dtypes[first + r] : FP32;
        char *place = out ? out + at * width(dtype) : (char *)contrasts;
        char padded[4 * SIDE];
        if (count < SIDE) {
            NAME(store_side)(total[r], padded, dtype, 0);
            memcpy(place, padded, count * width(dtype));
        } else {
            NAME(store_side)(total[r], place, dtype, out && streams(out, dtype, sums->pass.size));
        }
    }
}

INLINE void NAME(sum_sides)(
    const Sums *sums, int64_t first, int rows, int64_t start, int64_t stop, float *contrasts) {
    int64_t at = start;
    for (; at + SIDE <= stop; at += SIDE) NAME(sum_side)(sums, first, rows, at, SIDE, contrasts + at - start);
    if (at < stop)
        NAME(sum_side)(sums, first, rows, at, stop - at, contrasts + at - start);
}

/* Four sums at once, then four others of what is in the cache by now. */
static TARGET void NAME(sum_part)(const Sums *sums, int64_t start, int64_t stop, float *contrasts) {
    for (int64_t first = 0; first < sums->count; first += 4) switch (sums->count - first) {
        case 1:
            NAME(sum_sides)(sums, first, 1, start, stop, contrasts);
            break;
        case 2:
            NAME(sum_sides)(sums, first, 2, start, stop, contrasts);
            break;
        case 3:
            NAME(sum_sides)(sums, first, 3, start, stop, contrasts);
            break;
        default:
            NAME(sum_sides)(sums, first, 4, start, stop, contrasts);
        }
}

static TARGET void NAME(take_sums)(Sums *sums) {
    Pass *pass = &sums->pass;
    int64_t part = part_of_block(sums, 4);
    float contrasts[BLOCK];
    for (;;) {
        int64_t chunk = __atomic_fetch_add(&pass->next, 1, __ATOMIC_RELAXED);
        if (chunk * CHUNK >= pass->size)
            break;
        int64_t stop = smaller((chunk + 1) * CHUNK, pass->size);
        int64_t segment = pass->partials ? segment_at(pass, chunk * CHUNK) : 0;
        for (int64_t at = chunk * CHUNK; at < stop; at += BLOCK) {
            int64_t end = smaller(at + BLOCK, stop);
            for (int64_t begin = at; begin < end; begin += part)
                NAME(sum_part)(sums, begin, smaller(begin + part, end), contrasts + begin - at);
            if (pass->partials)
                segment = NAME(add_squares)(pass, at, end, contrasts, segment);
        }
    }
    NAME(fence)();
}
#undef FEW
#undef SIDE
