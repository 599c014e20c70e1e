//! From the network's map of where the lesion is to an outline in pixels of the submitted image.
//!
//! The map is of the squashed frame, as the network sees it; a point of it lies at the same share of the width and of
//! the height of the image as displayed. Every number of a report follows from the vertices as they are printed.

use contour::{Contour, ContourBuilder};
use simplify_polyline::{Point, point, simplify};

/// What the network says of each place: from 0 on it is not less likely lesion than not.
#[derive(Debug, Clone, PartialEq)]
pub struct Map {
    /// Columns.
    pub width: usize,
    /// Logits, row by row, the uppermost first.
    pub logits: Vec<f32>,
}

/// How far the simplified outline may be from the one of the map, in places of the map.
const TOLERANCE: f64 = 0.2;
/// Units of a vertex in a pixel.
const TENTHS: f64 = 10.0;

/// The outline of a lesion: a polygon of at least three vertices that encloses an area.
#[derive(Debug, Clone, PartialEq)]
pub struct Outline {
    /// Columns and rows from the upper left corner, in tenths of a pixel. The first is not repeated at the end.
    vertices: Vec<[u32; 2]>,
    /// The mean probability that a place within is lesion, between 0 and 1; absent when it lies around no place.
    confidence: Option<f64>,
}

impl Outline {
    /// The largest connected part of the lesion, in an image of `width` x `height` pixels; `None` when the network sees
    /// none. Holes in it are filled.
    pub fn of(map: &Map, width: u32, height: u32) -> Option<Self> {
        let (columns, rows) = (map.width, map.logits.len() / map.width);
        let logits: Vec<f64> = map.logits.iter().map(|logit| f64::from(*logit)).collect();
        let contours = ContourBuilder::new(columns, rows, true).contours(&logits, &[0.0]).ok()?;
        let scale = |value: f64, places: usize, pixels: u32| {
            (value / places as f64 * f64::from(pixels) * TENTHS)
                .round()
                .clamp(0.0, f64::from(pixels) * TENTHS) as u32
        };
        let outlines = contours.iter().flat_map(Contour::geometry).map(|part| {
            let ring: Vec<Point<2, f64>> = part.exterior().coords().map(|at| point!(at.x, at.y)).collect();
            let ring = simplify(&ring, TOLERANCE, true);
            let mut vertices: Vec<[u32; 2]> = ring
                .iter()
                .map(|at| [scale(at.vec[0], columns, width), scale(at.vec[1], rows, height)])
                .collect();
            vertices.dedup();
            if vertices.first() == vertices.last() {
                vertices.pop();
            }
            Self { vertices, confidence: None }
        });
        let outline = outlines.max_by_key(Self::doubled_area).filter(|outline| outline.doubled_area() > 0)?;
        let confidence = outline.mean_within(map, rows, width, height);
        Some(Self { confidence, ..outline })
    }

    /// The mean probability of the places whose centre is within.
    fn mean_within(&self, map: &Map, rows: usize, width: u32, height: u32) -> Option<f64> {
        let centre = |n: usize, places: usize, pixels: u32| {
            (n as f64 + 0.5) / places as f64 * f64::from(pixels) * TENTHS
        };
        let within = (0..map.logits.len()).filter(|place| {
            let (x, y) = (place % map.width, place / map.width);
            self.contains(centre(x, map.width, width), centre(y, rows, height))
        });
        let (sum, number) = within.fold((0.0, 0u32), |(sum, number), place| {
            (sum + 1.0 / (1.0 + (-f64::from(map.logits[place])).exp()), number + 1)
        });
        (number > 0).then(|| sum / f64::from(number))
    }

    /// Whether a point, in tenths of a pixel, is within: a ray from it crosses the outline an odd number of times.
    fn contains(&self, x: f64, y: f64) -> bool {
        let crossed = |([ax, ay], [bx, by]): ([u32; 2], [u32; 2])| {
            let (ax, ay, bx, by) = (f64::from(ax), f64::from(ay), f64::from(bx), f64::from(by));
            (ay > y) != (by > y) && x < ax + (y - ay) / (by - ay) * (bx - ax)
        };
        self.edges().filter(|edge| crossed(*edge)).count() % 2 == 1
    }

    fn edges(&self) -> impl Iterator<Item = ([u32; 2], [u32; 2])> {
        let next = self.vertices.iter().cycle().skip(1);
        self.vertices.iter().zip(next).map(|(from, to)| (*from, *to))
    }

    /// Twice the area in hundredths of a square pixel (the shoelace formula).
    fn doubled_area(&self) -> u64 {
        let product = |([ax, ay], [bx, by]): ([u32; 2], [u32; 2])| {
            i64::from(ax) * i64::from(by) - i64::from(bx) * i64::from(ay)
        };
        self.edges().map(product).sum::<i64>().unsigned_abs()
    }

    /// The share of an image of `width` x `height` pixels that it encloses, in hundredths of a per cent.
    pub fn share(&self, width: u32, height: u32) -> u32 {
        let whole = 2.0 * TENTHS * TENTHS * f64::from(width) * f64::from(height);
        (self.doubled_area() as f64 / whole * 10_000.0).round() as u32
    }

    /// Left, top, width and height of the smallest upright rectangle around it, in tenths of a pixel.
    pub fn bounds(&self) -> [u32; 4] {
        let side = |axis: usize| {
            let along = || self.vertices.iter().map(|vertex| vertex[axis]);
            let least = along().min().unwrap_or(0);
            (least, along().max().unwrap_or(0) - least)
        };
        let ((left, width), (top, height)) = (side(0), side(1));
        [left, top, width, height]
    }

    /// The mean probability that a place within is lesion, in hundredths of a per cent; `None` when it is smaller than a
    /// place of the map.
    pub fn confidence(&self) -> Option<u32> {
        self.confidence.map(|confidence| (confidence * 10_000.0).round() as u32)
    }

    /// The vertices, with the first one again at the end: columns and rows, in tenths of a pixel.
    pub fn ring(&self) -> impl Iterator<Item = [u32; 2]> {
        self.vertices.iter().chain(self.vertices.first()).copied()
    }

    /// As well-known text (OGC 06-103r4), in pixels.
    pub fn wkt(&self) -> String {
        let text = |[x, y]: [u32; 2]| format!("{} {}", in_pixels(x), in_pixels(y));
        let ring: Vec<String> = self.ring().map(text).collect();
        format!("POLYGON (({}))", ring.join(", "))
    }
}

fn in_pixels(tenths: u32) -> String {
    match tenths % 10 {
        0 => (tenths / 10).to_string(),
        tenth => format!("{}.{tenth}", tenths / 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map of 40 x 40 places, of which those are lesion that `is_lesion` says.
    fn map(is_lesion: impl Fn(f64, f64) -> bool) -> Map {
        let logit = |place: usize| {
            let (x, y) = ((place % 40) as f64 + 0.5, (place / 40) as f64 + 0.5);
            if is_lesion(x, y) { 4.0 } else { -4.0 }
        };
        Map { width: 40, logits: (0..1_600).map(logit).collect() }
    }

    fn disc(x: f64, y: f64, radius: f64) -> impl Fn(f64, f64) -> bool {
        move |a, b| (a - x).hypot(b - y) < radius
    }

    #[test]
    fn a_disc_is_where_it_is_and_as_large() {
        let outline = Outline::of(&map(disc(10.0, 30.0, 5.0)), 800, 400).unwrap();
        // A place is 20 x 10 pixels.
        let expected = std::f64::consts::PI * 100.0 * 50.0 / (800.0 * 400.0) * 10_000.0;
        let share = f64::from(outline.share(800, 400));
        assert!((share - expected).abs() < 0.06 * expected, "{share} {expected}");
        let [left, top, width, height] = outline.bounds();
        for (found, expected) in [(left, 1_000), (top, 2_500), (width, 2_000), (height, 1_000)] {
            assert!(found.abs_diff(expected) <= 120, "{:?}", outline.bounds());
        }
        assert!(outline.vertices.len() < 40, "{}", outline.vertices.len());
        assert!(outline.contains(2_000.0, 3_000.0) && !outline.contains(2_000.0, 1_000.0));
        assert!((9_300..=9_821).contains(&outline.confidence().unwrap()), "{:?}", outline.confidence());
    }

    #[test]
    fn the_text_has_the_area_that_is_stated() {
        let outline = Outline::of(&map(disc(22.0, 17.0, 9.0)), 1_337, 911).unwrap();
        let text = outline.wkt();
        let ring = text.strip_prefix("POLYGON ((").unwrap().strip_suffix("))").unwrap();
        let points: Vec<(f64, f64)> = ring
            .split(", ")
            .map(|at| at.split_once(' ').map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap())).unwrap())
            .collect();
        assert_eq!(points.first(), points.last());
        let area = points.windows(2).map(|e| e[0].0 * e[1].1 - e[1].0 * e[0].1).sum::<f64>().abs() / 2.0;
        let share = (area / (1_337.0 * 911.0) * 10_000.0).round();
        assert!((share - f64::from(outline.share(1_337, 911))).abs() < 1e-9);
    }

    #[test]
    fn of_several_parts_the_largest_counts_and_holes_are_filled() {
        let ring = |x: f64, y: f64| (4.0..9.0).contains(&(x - 12.0).hypot(y - 12.0));
        let two = map(|x, y| ring(x, y) || disc(33.0, 33.0, 3.0)(x, y));
        let whole = Outline::of(&map(disc(12.0, 12.0, 9.0)), 400, 400).unwrap();
        assert_eq!(Outline::of(&two, 400, 400).unwrap().vertices, whole.vertices);
    }

    #[test]
    fn a_lesion_may_fill_the_frame_or_be_absent() {
        let all = Outline::of(&map(|_, _| true), 300, 200).unwrap();
        // The corners are cut, by half a place.
        assert!((9_990..=10_000).contains(&all.share(300, 200)), "{}", all.share(300, 200));
        assert_eq!(all.bounds(), [0, 0, 3_000, 2_000]);
        assert_eq!(Outline::of(&map(|_, _| false), 300, 200), None);
    }
}
