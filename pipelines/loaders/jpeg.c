/* Decodes a rectangle of a JPEG to RGB, bit-identical to Pillow. Many threads call it at once, through ctypes; it keeps
 * no state between images. */

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "libjpeg-turbo 2.1 or later is needed: other libjpegs cannot decode part of an image"
#endif

#define MARGIN 4

enum verdict { DECODED, REFUSED, TOO_MANY_SCANS };

struct guard {
    struct jpeg_error_mgr errors; /* must be first: libjpeg points to this member */
    jmp_buf escape;
    enum verdict verdict;
    int max_scans;
};

static void leave(j_common_ptr info, enum verdict verdict)
{
    struct guard *guard = (struct guard *)info->err;
    guard->verdict = verdict;
    longjmp(guard->escape, 1);
}

static void on_error(j_common_ptr info)
{
    leave(info, REFUSED);
}

static void on_message(j_common_ptr info, int level)
{
    if (level < 0) /* a warning: libjpeg would continue with made-up data */
        leave(info, REFUSED);
}

static void on_progress(j_common_ptr info)
{
    if (((j_decompress_ptr)info)->input_scan_number > ((struct guard *)info->err)->max_scans)
        leave(info, TOO_MANY_SCANS);
}

/* Whether libjpeg decodes this kind of JPEG exactly as Pillow does. */
static int is_plain(const struct jpeg_decompress_struct *info)
{
    if (info->data_precision != 8 || info->arith_code)
        return 0;
    if (info->num_components == 1)
        return info->jpeg_color_space == JCS_GRAYSCALE;
    return info->num_components == 3 && (info->jpeg_color_space == JCS_YCbCr || info->jpeg_color_space == JCS_RGB);
}

/* Whether a progressive file has the scans for every bit. If not, libjpeg smooths, and versions differ in how. */
static int is_complete(const struct jpeg_decompress_struct *info)
{
    if (!info->progressive_mode)
        return 1;
    for (int component = 0; component < info->num_components; component++)
        for (int k = 0; k < DCTSIZE2; k++)
            if (info->coef_bits[component][k] != 0)
                return 0;
    return 1;
}

/* Decode columns x0 <= x < x1 of rows y0 <= y < y1 of a JPEG file of `size` bytes into `out`, which holds the
 * whole image of `height` x `width` pixels with rows `stride` bytes apart. May write other pixels of these rows, but no
 * other rows. Returns a verdict; unless it is DECODED, the contents of `out` are undefined. When the arguments change,
 * change the function's name too, so that an older build is not called with them. */
int fastdeit_decode(const uint8_t *src, size_t size, uint32_t height, uint32_t width, uint8_t *out, size_t stride,
                    uint32_t x0, uint32_t y0, uint32_t x1, uint32_t y1, int max_scans)
{
    struct jpeg_decompress_struct info;
    struct jpeg_progress_mgr progress = {.progress_monitor = on_progress};
    struct guard guard;

    if (x0 >= x1 || x1 > width || y0 >= y1 || y1 > height || stride / 3 < width)
        return REFUSED;
    info.err = jpeg_std_error(&guard.errors);
    guard.errors.error_exit = on_error;
    guard.errors.emit_message = on_message;
    guard.max_scans = max_scans;
    guard.verdict = DECODED;
    if (setjmp(guard.escape)) {
        jpeg_destroy_decompress(&info);
        return guard.verdict;
    }
    jpeg_create_decompress(&info);
    info.progress = &progress;
    jpeg_mem_src(&info, src, size);
    jpeg_read_header(&info, TRUE);
    if (info.image_height != height || info.image_width != width || !is_plain(&info))
        leave((j_common_ptr)&info, REFUSED);
    info.out_color_space = JCS_RGB;
    info.dct_method = JDCT_ISLOW;
    info.do_fancy_upsampling = TRUE;
    jpeg_start_decompress(&info);
    if (!is_complete(&info))
        leave((j_common_ptr)&info, REFUSED);

    /* Upsampling treats the first and last decoded columns as the edges of the image. It reads three chroma samples, so
     * four extra pixels on each side keep those edges outside the region. */
    JDIMENSION left = x0 > MARGIN ? x0 - MARGIN : 0;
    JDIMENSION columns = (width - x1 > MARGIN ? x1 + MARGIN : width) - left;
    jpeg_crop_scanline(&info, &left, &columns);
    if (y0 > 0)
        jpeg_skip_scanlines(&info, y0);
    while (info.output_scanline < y1) {
        JSAMPROW rows[4]; /* the most that one call returns */
        JDIMENSION count = 0;
        for (JDIMENSION y = info.output_scanline; y < y1 && count < 4; y++)
            rows[count++] = out + y * stride + (size_t)3 * left;
        if (!jpeg_read_scanlines(&info, rows, count))
            leave((j_common_ptr)&info, REFUSED);
    }
    if (y1 == height)
        jpeg_finish_decompress(&info); /* warns if the end of the file is missing */
    jpeg_destroy_decompress(&info);
    return DECODED;
}
