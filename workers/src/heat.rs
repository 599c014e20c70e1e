//! Heat maps: how probable a class is for each place of an image by itself, as a picture.
//!
//! The model's logits are the mean of those of its places (Zhou et al. 2016, class activation mapping), so that softmax of
//! a place is what the model would say if it saw the same everywhere.

use std::{io::Write, iter};

use dermflow_schemas::limits::MAX_HEAT_MAP_BYTES;
use png::{BitDepth, ColorType, DeflateCompression, Encoder, EncodingError, Filter};

use crate::{engine::Activation, model::Model};

/// From 1 to 9. This one takes twice as long as the first ones, for half of their bytes.
const COMPRESSION: DeflateCompression = DeflateCompression::Level(6);

/// Viridis (Smith and van der Walt, matplotlib 1.5, CC0) at every eighth from 0 to 1: even steps look even, in grey and
/// to the colour-blind too.
const VIRIDIS: [[u8; 3]; 9] = [
    [0x44, 0x01, 0x54],
    [0x47, 0x2d, 0x7b],
    [0x3b, 0x52, 0x8b],
    [0x2c, 0x72, 0x8e],
    [0x21, 0x91, 0x8c],
    [0x28, 0xae, 0x80],
    [0x5e, 0xc9, 0x62],
    [0xad, 0xdc, 0x30],
    [0xfd, 0xe7, 0x25],
];

/// A heat map as a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeatMap {
    /// Which of the model's conditions.
    pub class: usize,
    /// Columns, in pixels.
    pub width: u32,
    /// Rows, in pixels.
    pub height: u32,
    /// Places that the model tells apart, columns and rows.
    pub places: [usize; 2],
    /// A colour of the palette for each per cent, and so an index from 0 to 100 for each pixel.
    pub png: Vec<u8>,
}

/// Heat maps for `classes` on an image of `width` x `height` pixels as displayed, each of that size; or of half of it,
/// again and again, until it has no more than [`MAX_HEAT_MAP_BYTES`]. `None` when the activation does not fit the model.
pub fn render(
    model: &Model,
    activation: &Activation,
    classes: &[usize],
    width: u32,
    height: u32,
) -> Option<Vec<HeatMap>> {
    let places = activation.width * activation.height;
    let opinions = (0..places).map(|place| {
        let logits: Vec<f32> = activation.logits.iter().skip(place).step_by(places).copied().collect();
        model.opinion(&logits)
    });
    let opinions = opinions.collect::<Option<Vec<_>>>()?;
    let places = [activation.width, activation.height];
    let map = |class: &usize| {
        let heat = |opinion: &crate::model::Opinion| opinion.skin.unwrap_or(1.0) * opinion.conditions[*class];
        let heat: Vec<f64> = opinions.iter().map(heat).collect();
        let halves = |(width, height): &(u32, u32)| Some((width.div_ceil(2), height.div_ceil(2)));
        let mut drawn = iter::successors(Some((width, height)), halves).map(|(width, height)| {
            let png = draw(&heat, places, width, height).ok()?;
            Some(HeatMap { class: *class, width, height, places, png })
        });
        drawn.find(|map| map.as_ref().is_none_or(|map| map.png.len() <= MAX_HEAT_MAP_BYTES))?
    };
    classes.iter().map(map).collect()
}

/// A file: bilinear between the centres of the places; beyond the outer ones as there.
fn draw(
    heat: &[f64],
    [columns, rows]: [usize; 2],
    width: u32,
    height: u32,
) -> Result<Vec<u8>, EncodingError> {
    let between = |pixel: u32, pixels: u32, places: usize| {
        let at = (f64::from(pixel) + 0.5) / f64::from(pixels) * places as f64 - 0.5;
        let at = at.clamp(0.0, places as f64 - 1.0);
        (at as usize, (at as usize + 1).min(places - 1), at.fract())
    };
    let across: Vec<(usize, usize, f32)> = (0..width)
        .map(|x| {
            let (left, right, along) = between(x, width, columns);
            (left, right, along as f32)
        })
        .collect();
    let gaps: Vec<&[(usize, usize, f32)]> = across.chunk_by(|a, b| a.0 == b.0).collect();
    let mut png = Vec::new();
    let mut encoder = Encoder::new(&mut png, width, height);
    encoder.set_color(ColorType::Indexed);
    encoder.set_depth(BitDepth::Eight);
    encoder
        .set_palette((0..=100).flat_map(|percent| colour(f64::from(percent) / 100.0)).collect::<Vec<u8>>());
    // Most pixels are as the one before.
    encoder.set_filter(Filter::Sub);
    encoder.set_deflate_compression(COMPRESSION);
    let mut writer = encoder.write_header()?;
    let mut file = writer.stream_writer()?;
    let mut row = Vec::with_capacity(across.len());
    for y in 0..height {
        let (above, below, down) = between(y, height, rows);
        // In per cent, and half of one more, as what is behind the point is cut off.
        let line: Vec<f32> = (0..columns)
            .map(|x| heat[above * columns + x] * (1.0 - down) + heat[below * columns + x] * down)
            .map(|value| (value * 100.0 + 0.5) as f32)
            .collect();
        row.clear();
        for gap in &gaps {
            let (from, to) = gap.first().map_or((0.0, 0.0), |(left, right, _)| (line[*left], line[*right]));
            row.extend(gap.iter().map(|(_, _, along)| (from + (to - from) * along) as u8));
        }
        file.write_all(&row)?;
    }
    file.finish()?;
    writer.finish()?;
    Ok(png)
}

/// The colour of a value between 0 and 1.
fn colour(value: f64) -> [u8; 3] {
    let at = value * (VIRIDIS.len() - 1) as f64;
    let (low, high) = (at as usize, (at as usize + 1).min(VIRIDIS.len() - 1));
    [0, 1, 2].map(|channel| {
        let (from, to) = (f64::from(VIRIDIS[low][channel]), f64::from(VIRIDIS[high][channel]));
        (from + (to - from) * at.fract()).round() as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::with_domain;

    /// 5 x 5 places: the first condition wins in the upper left one, what is no skin in the lower right one, and the third
    /// condition elsewhere.
    fn activation() -> Activation {
        let logit = |n: usize| match (n / 25, n % 25) {
            (0, 0) | (3, 24) => 20.0,
            (2, place) if place != 0 && place != 24 => 20.0,
            _ => 0.0,
        };
        Activation { width: 5, height: 5, logits: (0..100).map(logit).collect() }
    }

    fn decoded(map: &HeatMap) -> image::RgbImage {
        image::load_from_memory(&map.png).unwrap().into_rgb8()
    }

    #[test]
    fn a_place_has_the_colour_of_its_probability() {
        let maps = render(&with_domain(&[]), &activation(), &[0, 2], 600, 450).unwrap();
        let [first, third] = &maps[..] else { panic!("two maps") };
        assert_eq!((first.width, first.height), (600, 450));
        let (hot, cold) = (image::Rgb(VIRIDIS[8]), image::Rgb(VIRIDIS[0]));
        for (map, corner, middle) in [(first, hot, cold), (third, cold, hot)] {
            let picture = decoded(map);
            assert_eq!(picture.dimensions(), (600, 450));
            assert_eq!(*picture.get_pixel(0, 0), corner);
            assert_eq!(*picture.get_pixel(300, 225), middle);
            assert_eq!(*picture.get_pixel(599, 449), cold, "no skin");
        }
    }

    #[test]
    fn a_map_has_the_size_of_its_image() {
        let maps = render(&with_domain(&[]), &activation(), &[0], 90, 300).unwrap();
        assert_eq!(decoded(&maps[0]).dimensions(), (90, 300));
        let odd = Activation { logits: vec![0.0; 99], ..activation() };
        assert_eq!(render(&with_domain(&[]), &odd, &[0], 90, 300), None);
    }

    /// Even steps of the value are steps of the colour, in order of brightness.
    #[test]
    fn brighter_is_more() {
        let brightness = |level: u32| {
            let [red, green, blue] = colour(f64::from(level) / 100.0).map(u32::from);
            299 * red + 587 * green + 114 * blue
        };
        assert!((0..100).all(|level| brightness(level) < brightness(level + 1)));
    }

    /// Noise, of which 640,000 pixels have more bytes than there may be.
    #[test]
    fn a_file_that_is_too_large_is_one_of_half_the_size() {
        let mut seed = 1u32;
        let noise = (0..4 * 800 * 799).map(|_| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as f32 / 3e6
        });
        let noise = Activation { width: 800, height: 799, logits: noise.collect() };
        let map = &render(&with_domain(&[]), &noise, &[0], 800, 799).unwrap()[0];
        assert_eq!((map.width, map.height), (400, 400));
        assert!(map.png.len() <= MAX_HEAT_MAP_BYTES);
        assert_eq!(decoded(map).dimensions(), (400, 400));
    }

    /// As many as there may be, and 256 KiB for everything else in a report.
    #[test]
    fn the_largest_report_fits_into_a_message() {
        use dermflow_schemas::limits::{MAX_HEAT_MAPS, MAX_IMAGES, MAX_INLINE_BYTES};
        let maps = MAX_IMAGES * MAX_HEAT_MAPS as usize * MAX_HEAT_MAP_BYTES.div_ceil(3) * 4;
        assert!(maps + 256 * 1024 < MAX_INLINE_BYTES, "{maps}");
    }

    /// Of a photograph of 12 megapixels, too, when the places are as different as can be.
    #[test]
    fn a_photograph_has_a_map_of_its_size() {
        let logit = |n: usize| if n / 25 == n % 25 % 2 { 20.0 } else { 0.0 };
        let different = Activation { logits: (0..100).map(logit).collect(), ..activation() };
        let map = &render(&with_domain(&[]), &different, &[0], 4_000, 3_000).unwrap()[0];
        assert_eq!((map.width, map.height), (4_000, 3_000));
        assert!(map.png.len() < MAX_HEAT_MAP_BYTES / 2, "{}", map.png.len());
    }
}
