//! Bilinear resizing with antialiasing, to the bit as Pillow does it (`src/libImaging/Resample.c`): models are trained and
//! evaluated with that, and one value in a hundred that is off by one moves probabilities in the second decimal.
//!
//! Weights are fixed-point numbers, and the first of two passes is rounded to whole values. Which one that is matters as
//! much: Pillow 13 takes whichever is quicker, so that it has to be told (`bilinear` in `models/derm7/pixels.py`).

use image::RgbImage;

/// Bits of a weight behind the point.
const PRECISION: u32 = 22;
const CHANNELS: usize = 3;

/// What a pixel of the result is made of.
struct Kernel {
    /// The first pixel.
    start: usize,
    /// Weights of it and those that follow; their sum is 1.
    weights: Vec<i32>,
}

/// One for each of `to` pixels, from `from` pixels.
fn kernels(from: u32, to: u32) -> Vec<Kernel> {
    let scale = f64::from(from) / f64::from(to);
    let support = scale.max(1.0);
    let kernel = |pixel: u32| {
        let centre = (f64::from(pixel) + 0.5) * scale;
        let start = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(from as usize);
        let triangle = |at: usize| (1.0 - ((at as f64 - centre + 0.5) / support).abs()).max(0.0);
        let weights: Vec<f64> = (start..end).map(triangle).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: f64| (0.5 + weight / sum * f64::from(1 << PRECISION)) as i32;
        Kernel { start, weights: weights.into_iter().map(fixed).collect() }
    };
    (0..to).map(kernel).collect()
}

/// From fixed point to a whole value.
fn rounded(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION - 1);

/// Resizes to `width` columns.
pub fn columns(pixels: &RgbImage, width: u32) -> RgbImage {
    if pixels.width() == width {
        return pixels.clone();
    }
    let kernels = kernels(pixels.width(), width);
    let mut resized = RgbImage::new(width, pixels.height());
    let rows = pixels.chunks_exact(pixels.width() as usize * CHANNELS);
    for (row, result) in rows.zip(resized.chunks_exact_mut(width as usize * CHANNELS)) {
        for (Kernel { start, weights }, result) in kernels.iter().zip(result.chunks_exact_mut(CHANNELS)) {
            let mut sums = [HALF; CHANNELS];
            for (pixel, weight) in row[start * CHANNELS..].chunks_exact(CHANNELS).zip(weights) {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(*value) * weight;
                }
            }
            result.copy_from_slice(&sums.map(rounded));
        }
    }
    resized
}

/// Resizes to `height` rows.
pub fn rows(pixels: &RgbImage, height: u32) -> RgbImage {
    if pixels.height() == height {
        return pixels.clone();
    }
    let length = pixels.width() as usize * CHANNELS;
    let mut resized = RgbImage::new(pixels.width(), height);
    let kernels = kernels(pixels.height(), height);
    let mut sums = vec![HALF; length];
    for (Kernel { start, weights }, result) in kernels.iter().zip(resized.chunks_exact_mut(length)) {
        sums.fill(HALF);
        for (row, weight) in pixels.as_raw()[start * length..].chunks_exact(length).zip(weights) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        for (sum, value) in sums.iter().zip(result) {
            *value = rounded(*sum);
        }
    }
    resized
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    fn line(values: &[u8]) -> RgbImage {
        RgbImage::from_fn(values.len() as u32, 1, |x, _| {
            Rgb([values[x as usize], 255 - values[x as usize], 7])
        })
    }

    /// What Pillow 13.0 gives: `Image.fromarray(…).resize((n, 1), Image.Resampling.BILINEAR)`.
    #[test]
    fn a_line_is_resized_as_by_pillow() {
        let values = [0, 255, 3, 90, 91, 250, 17, 201, 128, 64, 33];
        for (width, expected) in [
            (1, vec![109]),
            (4, vec![108, 106, 133, 83]),
            (7, vec![102, 87, 85, 167, 116, 122, 45]),
            (11, vec![0, 255, 3, 90, 91, 250, 17, 201, 128, 64, 33]),
            (13, vec![0, 196, 100, 43, 90, 115, 250, 53, 144, 162, 103, 57, 33]),
            (20, vec![0, 83, 223, 148, 9, 49, 90, 91, 119, 206, 186, 58, 86, 187, 166, 126, 91, 60, 43, 33]),
        ] {
            let reds: Vec<u8> = columns(&line(&values), width).pixels().map(|pixel| pixel.0[0]).collect();
            assert_eq!(reds, expected, "{width}");
            let turned = image::imageops::rotate90(&line(&values));
            let reds: Vec<u8> = rows(&turned, width).pixels().map(|pixel| pixel.0[0]).collect();
            assert_eq!(reds, expected, "{width} rows");
        }
    }

    #[test]
    fn what_is_even_stays_so() {
        let even = RgbImage::from_pixel(37, 53, Rgb([255, 1, 128]));
        for side in [1, 2, 36, 38, 160] {
            let resized = rows(&columns(&even, side), side);
            assert_eq!(resized.dimensions(), (side, side));
            assert!(resized.pixels().all(|pixel| pixel.0 == [255, 1, 128]), "{side}");
        }
    }
}
