/* The product of two square float matrices as loops, for bench/trainer_products.py. */
#include <stddef.h>

/* c = a b, the textbook's three loops: each entry is a dot product down a column of b. */
void naive(size_t n, const float *a, const float *b, float *c) {
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) {
            float sum = 0;
            for (size_t k = 0; k < n; k++) sum += a[i * n + k] * b[k * n + j];
            c[i * n + j] = sum;
        }
}

/* The same in tiles that stay in cache, walked row by row; rows of tiles go to `threads` threads. */
void blocked(size_t n, const float *a, const float *b, float *c, size_t tile, int threads) {
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads)
    for (size_t i0 = 0; i0 < n; i0 += tile) {
        size_t i1 = i0 + tile < n ? i0 + tile : n;
        for (size_t i = i0; i < i1; i++)
            for (size_t j = 0; j < n; j++) c[i * n + j] = 0;
        for (size_t k0 = 0; k0 < n; k0 += tile)
            for (size_t j0 = 0; j0 < n; j0 += tile) {
                size_t k1 = k0 + tile < n ? k0 + tile : n, j1 = j0 + tile < n ? j0 + tile : n;
                for (size_t i = i0; i < i1; i++)
                    for (size_t k = k0; k < k1; k++) {
                        float left = a[i * n + k];
                        for (size_t j = j0; j < j1; j++) c[i * n + j] += left * b[k * n + j];
                    }
            }
    }
}
