//! Whether an image is good enough: five measures, each from 0 to 100 %, of which the least is the score. Pure.
//!
//! All but the resolution are measured on a thumbnail of 256 pixels, so that they mean the same for a photograph of
//! 12 megapixels and for a thumbnail. Every threshold of the refusal is in this file; the model card has the figures.

use dermflow_schemas::limits::MIN_SIDE_PIXELS;
use image::RgbImage;

use crate::frame::Frame;

/// From this score on an image is analysed, in per cent.
pub const ACCEPTABLE: u32 = 50;

/// What a measure scores: nothing at `worst` and beyond, [`ACCEPTABLE`] at `limit`, 100 % at `best` and beyond.
struct Scale {
    worst: f64,
    limit: f64,
    best: f64,
}

// Set so that of the originals in HAM10000 (224 x 168), ISIC 2017 (256 x 256) and PAD-UFES-20 nearly all pass.

/// The share of the differences between neighbours that is left after blurring once more.
const FOCUS: Scale = Scale { worst: 0.62, limit: 0.51, best: 0.25 };
/// Mean luma of 255, from below. Dark skin in an ordinary light is above 50.
const DARK: Scale = Scale { worst: 15.0, limit: 40.0, best: 75.0 };
/// The same from above.
const BRIGHT: Scale = Scale { worst: 252.0, limit: 235.0, best: 200.0 };
/// The share of pixels without detail, as they are black or white.
const CLIPPED: Scale = Scale { worst: 0.6, limit: 0.3, best: 0.02 };
/// From the 2nd to the 98th percentile, of 255, of that channel of which it is most.
const CONTRAST: Scale = Scale { worst: 8.0, limit: 24.0, best: 80.0 };
/// The shorter side, in pixels.
const RESOLUTION: Scale = Scale { worst: MIN_SIDE_PIXELS as f64 * 0.75, limit: 112.0, best: 448.0 };
/// The share of the frame that is image, and not the black around a dermatoscope's field.
const COVERAGE: Scale = Scale { worst: 0.1, limit: 0.3, best: 0.6 };

/// Luma below which a pixel may belong to the black around the field, when it is connected with the frame's edge.
const BLACK: f32 = 24.0;
/// Channels up to here are without detail, and so are those from here on.
const CLIP: [u8; 2] = [6, 250];
/// Pixels over which is blurred.
const WINDOW: usize = 9;

impl Scale {
    /// In whole per cent.
    fn score(&self, value: f64) -> u32 {
        let along = |from: f64, to: f64| ((value - from) / (to - from)).clamp(0.0, 1.0);
        let acceptable = f64::from(ACCEPTABLE);
        let score =
            acceptable * along(self.worst, self.limit) + (100.0 - acceptable) * along(self.limit, self.best);
        score as u32
    }
}

/// How good an image is: per cent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quality {
    focus: u32,
    exposure: u32,
    contrast: u32,
    resolution: u32,
    coverage: u32,
}

/// The score in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grade {
    /// Not acceptable.
    Poor,
    /// Up to 65 %.
    Fair,
    /// Up to 90 %.
    Good,
    /// From there on.
    Excellent,
}

impl Quality {
    /// Measures an image.
    pub fn of(frame: &Frame) -> Self {
        Self::measure(&frame.thumbnail, frame.width.min(frame.height))
    }

    /// `small` is measured; the shorter side of the whole was `side`.
    fn measure(small: &RgbImage, side: u32) -> Self {
        let (width, height) = (small.width() as usize, small.height() as usize);
        let luma: Vec<f32> = small.pixels().map(|pixel| luma(pixel.0)).collect();
        let black = surroundings(&luma, width, height);
        let covered = black.iter().filter(|black| !**black).count();
        let coverage = covered as f64 / black.len().max(1) as f64;
        // What is all black is measured as a whole.
        let field: Vec<bool> = black.iter().map(|black| !black || coverage < 0.01).collect();
        let pixels = || small.pixels().zip(&field).filter(|(_, within)| **within).map(|(pixel, _)| pixel.0);
        let number = field.iter().filter(|within| **within).count().max(1);

        let mut histograms = [[0usize; 256]; 3];
        let (mut sum, mut clipped) = (0.0, 0usize);
        for pixel in pixels() {
            for (histogram, value) in histograms.iter_mut().zip(pixel) {
                histogram[usize::from(value)] += 1;
            }
            sum += f64::from(self::luma(pixel));
            let [low, high] = CLIP;
            let lost = pixel.iter().all(|value| *value <= low) || pixel.iter().all(|value| *value >= high);
            clipped += usize::from(lost);
        }
        let mean = sum / number as f64;
        let range = |histogram: &[usize; 256]| {
            percentile(histogram, number, 0.98) - percentile(histogram, number, 0.02)
        };
        let contrast = histograms.iter().map(range).max().unwrap_or(0);
        let exposure = [DARK.score(mean), BRIGHT.score(mean), CLIPPED.score(clipped as f64 / number as f64)];
        Self {
            focus: FOCUS.score(blur(&luma, &field, width, height)),
            exposure: exposure.into_iter().min().unwrap_or(0),
            contrast: CONTRAST.score(contrast as f64),
            resolution: RESOLUTION.score(f64::from(side)),
            coverage: COVERAGE.score(coverage),
        }
    }

    /// The parts: the end of the code, in words, per cent.
    pub fn parts(&self) -> [(&'static str, &'static str, u32); 5] {
        [
            ("focus", "Focus", self.focus),
            ("exposure", "Exposure", self.exposure),
            ("contrast", "Contrast", self.contrast),
            ("resolution", "Resolution", self.resolution),
            ("coverage", "Share of the frame that is image", self.coverage),
        ]
    }

    /// Per cent: an image is as good as the worst of its parts.
    pub fn score(&self) -> u32 {
        self.parts().iter().map(|(_, _, score)| *score).min().unwrap_or(0)
    }

    /// Whether it is analysed.
    pub fn is_acceptable(&self) -> bool {
        self.score() >= ACCEPTABLE
    }

    /// In a word.
    pub fn grade(&self) -> Grade {
        match self.score() {
            0..ACCEPTABLE => Grade::Poor,
            ACCEPTABLE..65 => Grade::Fair,
            65..90 => Grade::Good,
            _ => Grade::Excellent,
        }
    }
}

/// ITU-R BT.601.
fn luma([red, green, blue]: [u8; 3]) -> f32 {
    0.299 * f32::from(red) + 0.587 * f32::from(green) + 0.114 * f32::from(blue)
}

/// The value below which this share of `number` values lies.
fn percentile(histogram: &[usize; 256], number: usize, share: f64) -> usize {
    let rank = (number as f64 * share) as usize;
    let mut below = 0;
    let reached = |count: &usize| {
        below += count;
        below > rank
    };
    histogram.iter().position(reached).unwrap_or(255)
}

/// Which pixels are black and connected with the edge of the frame.
fn surroundings(luma: &[f32], width: usize, height: usize) -> Vec<bool> {
    let mut found = vec![false; luma.len()];
    let at_edge = |place: &usize| {
        let (x, y) = (place % width, place / width);
        x == 0 || y == 0 || x + 1 == width || y + 1 == height
    };
    let mut open: Vec<usize> = (0..luma.len()).filter(at_edge).collect();
    while let Some(place) = open.pop() {
        if found[place] || luma[place] >= BLACK {
            continue;
        }
        found[place] = true;
        let x = place % width;
        open.extend((x > 0).then(|| place - 1));
        open.extend((x + 1 < width).then_some(place + 1));
        open.extend(place.checked_sub(width));
        open.extend(Some(place + width).filter(|below| *below < luma.len()));
    }
    found
}

/// The blur of Crété-Roffet et al. (2007, doi:10.1117/12.702790), from 0 to 1: what is sharp loses most of the
/// differences between its neighbours when it is blurred, what is blurred already loses few. The worse direction counts.
fn blur(luma: &[f32], field: &[bool], width: usize, height: usize) -> f64 {
    let rows = (0..height).map(|row| (row * width, 1, width));
    let columns = (0..width).map(|column| (column, width, height));
    let left = |lines: &mut dyn Iterator<Item = (usize, usize, usize)>| {
        let (mut all, mut lost) = (0.0, 0.0);
        for (start, step, length) in lines {
            let place = |n: usize| start + n.min(length - 1) * step;
            let value = |n: isize| luma[place(n.max(0) as usize)];
            let half = (WINDOW / 2) as isize;
            for n in 1..length {
                let next = n as isize;
                // Of the mean over the window, from the pixel before to this one.
                let change = (value(next + half) - value(next - 1 - half)) / WINDOW as f32;
                if field[place(n)] && field[place(n - 1)] {
                    let difference = (value(next) - value(next - 1)).abs();
                    all += f64::from(difference);
                    lost += f64::from((difference - change.abs()).max(0.0));
                }
            }
        }
        if all > 0.0 { 1.0 - lost / all } else { 1.0 }
    };
    left(&mut { rows }).max(left(&mut { columns }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Picture, fit};
    use dermflow_schemas::image::Format;
    use image::imageops;
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    fn images(folder: &Path) -> Vec<PathBuf> {
        let mut all: Vec<PathBuf> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|end| end == "jpg" || end == "png"))
            .collect();
        all.sort();
        all
    }

    fn frame(path: &Path) -> Frame {
        let format = if path.extension().unwrap() == "png" { Format::Png } else { Format::Jpeg };
        Frame::of(&Picture::decode(fs::read(path).unwrap(), format).unwrap(), (1, 1))
    }

    /// An image of its own, at the size at which is measured, and its shorter side.
    fn opened(path: &Path) -> (RgbImage, u32) {
        let frame = frame(path);
        (frame.thumbnail, frame.width.min(frame.height))
    }

    fn mapped(image: &RgbImage, change: impl Fn(f32) -> f32) -> RgbImage {
        let mut changed = image.clone();
        for value in changed.iter_mut() {
            *value = change(f32::from(*value)).round().clamp(0.0, 255.0) as u8;
        }
        changed
    }

    /// What makes an image worse: in words, and how much of it, growing; from the third step on it is clearly degraded.
    const WORSE: [(&str, [f32; 5]); 7] = [
        ("blurred", [0.5, 1.0, 2.0, 3.0, 5.0]),
        ("darkened", [0.8, 0.5, 0.15, 0.1, 0.05]),
        ("overexposed", [1.1, 1.3, 2.5, 3.0, 4.0]),
        ("flattened", [0.8, 0.5, 0.12, 0.08, 0.04]),
        ("made smaller", [0.9, 0.7, 0.0, 0.0, 0.0]),
        ("in a smaller field", [1.2, 1.0, 0.5, 0.4, 0.2]),
        ("between black bars", [0.9, 0.7, 0.25, 0.2, 0.1]),
    ];
    const CLEARLY: usize = 2;

    /// An image with black wherever `is_lost` says so, of the distance from the centre as a share of width and height.
    fn blackened(image: &RgbImage, is_lost: impl Fn(f32, f32) -> bool) -> RgbImage {
        let (width, height) = (image.width() as f32, image.height() as f32);
        let mut changed = image.clone();
        for (x, y, pixel) in changed.enumerate_pixels_mut() {
            if is_lost((x as f32 + 0.5) / width - 0.5, (y as f32 + 0.5) / height - 0.5) {
                *pixel = image::Rgb([2, 2, 2]);
            }
        }
        changed
    }

    /// As through a dermatoscope whose round field is `share` of the width and of the height.
    fn in_field(image: &RgbImage, share: f32) -> RgbImage {
        blackened(image, |across, down| across.hypot(down) > share / 2.0)
    }

    fn worse(image: &RgbImage, side: u32, how: &str, step: usize) -> Quality {
        let much = WORSE.iter().find(|(name, _)| *name == how).unwrap().1[step];
        let changed = match how {
            "blurred" => imageops::fast_blur(image, much),
            "darkened" | "overexposed" => mapped(image, |value| value * much),
            "flattened" => mapped(image, |value| 128.0 + (value - 128.0) * much),
            "in a smaller field" => in_field(image, much),
            "between black bars" => blackened(image, |_, down| down.abs() > much / 2.0),
            // To a shorter side that the API just takes, and somewhat more; beyond, by a factor.
            _ => {
                let least = [0, 0, 104, 92, MIN_SIDE_PIXELS][step];
                let side = if least > 0 { least.min(side) } else { (side as f32 * much) as u32 };
                let longer = (side * image.width().max(image.height())) / image.width().min(image.height());
                let (width, height) = fit(image.width(), image.height(), longer);
                let small = imageops::resize(image, width, height, imageops::FilterType::Triangle);
                return Quality::measure(&small, side);
            }
        };
        Quality::measure(&changed, side)
    }

    fn samples() -> Vec<PathBuf> {
        images(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/images"))
    }

    #[test]
    fn sample_images_are_acceptable() {
        for path in samples() {
            let quality = Quality::of(&frame(&path));
            assert!(quality.is_acceptable(), "{}: {quality:?}", path.display());
        }
    }

    /// The score never grows as an image gets worse (3 points for rounding to pixels), and in the end it is refused. Of what
    /// is black around it only the coverage counts: the other parts are those of what is left, which may be the sharper one.
    #[test]
    fn what_gets_worse_scores_less() {
        for path in samples() {
            let (image, side) = opened(&path);
            for (how, steps) in WORSE {
                let is_black = ["in a smaller field", "between black bars"].contains(&how);
                let counted = |of: &Quality| if is_black { of.coverage } else { of.score() };
                let mut last = counted(&Quality::measure(&image, side));
                for step in 0..steps.len() {
                    let quality = worse(&image, side, how, step);
                    let score = counted(&quality);
                    assert!(score <= last + 3, "{} {how} {step}: {last} to {quality:?}", path.display());
                    last = score;
                }
                assert!(last < ACCEPTABLE, "{} {how}: {last}", path.display());
            }
        }
    }

    /// The area under the ROC curve: how often the one scores more than the other.
    fn area(good: &[u32], bad: &[u32]) -> f64 {
        let wins =
            |g: &u32| bad.iter().map(|b| if g > b { 1.0 } else { f64::from(g == b) / 2.0 }).sum::<f64>();
        good.iter().map(wins).sum::<f64>() / (good.len() * bad.len()) as f64
    }

    /// `hits` of `all` with its 95 % interval (Wilson 1927, doi:10.1080/01621459.1927.10502953).
    fn share(hits: usize, all: usize) -> String {
        const Z: f64 = 1.959_964;
        let (n, p) = (all as f64, hits as f64 / all as f64);
        let scale = 1.0 + Z * Z / n;
        let middle = (p + Z * Z / (2.0 * n)) / scale;
        let half = Z / scale * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
        format!("{p:.3} ({:.3} to {:.3})", (middle - half).max(0.0), (middle + half).min(1.0))
    }

    #[test]
    fn a_share_has_its_interval() {
        // As R's binom.confint(…, methods = "wilson") has them.
        assert_eq!(share(0, 10), "0.000 (0.000 to 0.278)");
        assert_eq!(share(396, 400), "0.990 (0.975 to 0.996)");
    }

    /// Good images and clearly degraded ones of every kind are told apart. Over the samples, and over each folder of
    /// `DERMFLOW_IMAGES`, separated by colons; what was found is printed.
    #[test]
    fn degraded_images_are_told_apart() {
        const MOST: usize = 400;
        let more = std::env::var("DERMFLOW_IMAGES").unwrap_or_default();
        let folders =
            more.split(':').filter(|folder| !folder.is_empty()).map(|folder| images(Path::new(folder)));
        for all in std::iter::once(samples()).chain(folders) {
            let chosen: Vec<&PathBuf> = all.iter().step_by(all.len().div_ceil(MOST)).collect();
            let mut good = Vec::new();
            let mut bad: Vec<Vec<u32>> = vec![Vec::new(); WORSE.len()];
            for path in &chosen {
                let (image, side) = opened(path);
                good.push(Quality::measure(&image, side).score());
                for ((how, _), bad) in WORSE.iter().zip(&mut bad) {
                    bad.push(worse(&image, side, how, CLEARLY).score());
                }
            }
            let acceptable = |scores: &[u32]| scores.iter().filter(|score| **score >= ACCEPTABLE).count();
            let folder = chosen[0].parent().unwrap().display();
            let passed = acceptable(&good);
            println!("{folder}: {} images, {} acceptable", good.len(), share(passed, good.len()));
            assert!(passed * 100 >= good.len() * 95, "{folder}: {passed} of {}", good.len());
            for ((how, _), bad) in WORSE.iter().zip(&bad) {
                let area = area(&good, bad);
                println!("  {how}: {} acceptable, AUC {area:.3}", share(acceptable(bad), bad.len()));
                assert!(area >= 0.95, "{folder}, {how}: {area}");
            }
            println!("  all: AUC {:.3}", area(&good, &bad.concat()));
        }
    }

    /// The black around a dermatoscope's field is no image, and says nothing of the exposure; a dark lesion is image.
    #[test]
    fn black_at_the_edge_is_not_image() {
        let (image, side) = opened(&samples()[0]);
        let field = |share: f32| Quality::measure(&in_field(&image, share), side);
        let whole = Quality::measure(&image, side);
        assert_eq!((whole.coverage, field(0.9).coverage), (100, 100));
        assert!(field(0.9).exposure.abs_diff(whole.exposure) <= 5, "{:?} {whole:?}", field(0.9));
        assert!(field(0.5).coverage < ACCEPTABLE, "{:?}", field(0.5));
    }

    #[test]
    fn a_score_in_a_word() {
        let grade =
            |focus| Quality { focus, exposure: 100, contrast: 100, resolution: 100, coverage: 100 }.grade();
        for (score, expected) in [
            (ACCEPTABLE - 1, Grade::Poor),
            (ACCEPTABLE, Grade::Fair),
            (65, Grade::Good),
            (87, Grade::Good),
            (90, Grade::Excellent),
        ] {
            assert_eq!(grade(score), expected, "{score}");
        }
    }

    #[test]
    fn a_frame_without_content_is_poor() {
        for value in [0, 1, 128, 255] {
            let flat = RgbImage::from_pixel(300, 300, image::Rgb([value; 3]));
            assert_eq!(Quality::measure(&flat, 300).grade(), Grade::Poor, "{value}");
        }
    }
}
