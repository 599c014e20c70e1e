//! Heat maps: how probable a class is for each place of an image by itself, as a picture.
//!
//! The model's logits are the mean of those of its places (Zhou et al. 2016, class activation mapping), so that softmax of
//! a place is what the model would say if it saw the same everywhere.

use dermflow_schemas::limits::MAX_HEAT_MAP_SIDE;
use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

use crate::{decode::fit, engine::Activation, model::Model};

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
    /// RGB.
    pub png: Vec<u8>,
}

/// Heat maps for `classes` on an image of `width` x `height` pixels as displayed, or smaller in the same ratio. `None`
/// when the activation does not fit the model.
pub fn render(
    model: &Model,
    activation: &Activation,
    classes: &[usize],
    width: u32,
    height: u32,
) -> Option<Vec<HeatMap>> {
    let (width, height) = fit(width, height, MAX_HEAT_MAP_SIDE);
    let places = activation.width * activation.height;
    let opinions = (0..places).map(|place| {
        let logits: Vec<f32> = activation.logits.iter().skip(place).step_by(places).copied().collect();
        model.opinion(&logits)
    });
    let opinions = opinions.collect::<Option<Vec<_>>>()?;
    let map = |class: &usize| {
        let heat = |opinion: &crate::model::Opinion| opinion.skin.unwrap_or(1.0) * opinion.conditions[*class];
        let heat: Vec<f64> = opinions.iter().map(heat).collect();
        let pixels = paint(&heat, activation.width, activation.height, width, height);
        let mut png = Vec::new();
        PngEncoder::new(&mut png).write_image(&pixels, width, height, ExtendedColorType::Rgb8).ok()?;
        Some(HeatMap { class: *class, width, height, places: [activation.width, activation.height], png })
    };
    classes.iter().map(map).collect()
}

/// Bilinear between the centres of the places; beyond the outer ones as there.
fn paint(heat: &[f64], columns: usize, rows: usize, width: u32, height: u32) -> Vec<u8> {
    let palette: Vec<[u8; 3]> = (0..=255).map(|level| colour(f64::from(level) / 255.0)).collect();
    let between = |pixel: u32, pixels: u32, places: usize| {
        let at = (f64::from(pixel) + 0.5) / f64::from(pixels) * places as f64 - 0.5;
        let at = at.clamp(0.0, places as f64 - 1.0);
        (at as usize, (at as usize + 1).min(places - 1), at.fract())
    };
    let across: Vec<(usize, usize, f64)> = (0..width).map(|x| between(x, width, columns)).collect();
    let mut pixels = Vec::with_capacity(3 * width as usize * height as usize);
    for y in 0..height {
        let (above, below, down) = between(y, height, rows);
        let line: Vec<f64> = (0..columns)
            .map(|x| heat[above * columns + x] * (1.0 - down) + heat[below * columns + x] * down)
            .collect();
        for (left, right, along) in &across {
            let value = line[*left] * (1.0 - along) + line[*right] * along;
            pixels.extend_from_slice(&palette[(value.clamp(0.0, 1.0) * 255.0).round() as usize]);
        }
    }
    pixels
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
        assert_eq!((first.width, first.height), (320, 240));
        let (hot, cold) = (image::Rgb(VIRIDIS[8]), image::Rgb(VIRIDIS[0]));
        for (map, corner, middle) in [(first, hot, cold), (third, cold, hot)] {
            let picture = decoded(map);
            assert_eq!(picture.dimensions(), (320, 240));
            assert_eq!(*picture.get_pixel(0, 0), corner);
            assert_eq!(*picture.get_pixel(160, 120), middle);
            assert_eq!(*picture.get_pixel(319, 239), cold, "no skin");
        }
    }

    #[test]
    fn a_small_image_is_not_made_larger() {
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

    /// As many as there may be, and none made smaller by PNG, fit into a message.
    #[test]
    fn the_largest_report_fits_into_a_message() {
        use dermflow_schemas::limits::{MAX_HEAT_MAPS, MAX_IMAGES, MAX_INLINE_BYTES};
        let raw = 3 * MAX_HEAT_MAP_SIDE as usize * (MAX_HEAT_MAP_SIDE as usize + 1);
        let maps = MAX_IMAGES * MAX_HEAT_MAPS as usize * raw * 4 / 3;
        assert!(maps + 1024 * 1024 < MAX_INLINE_BYTES, "{maps}");
    }
}
