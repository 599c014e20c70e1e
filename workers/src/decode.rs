//! From a file's bytes to pixels, with limits before every allocation.

use std::io::Cursor;

use dermflow_schemas::{
    image::{Format, header},
    limits::{MAX_DECODE_BYTES, MAX_SIDE_PIXELS},
};
use fast_image_resize::{
    FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer,
    images::{Image, ImageRef},
};
use image::{
    ColorType, DynamicImage, ImageDecoder, ImageError, ImageReader, Limits, RgbImage, metadata::Orientation,
};

use crate::resize;

/// Why a file with a right header cannot be decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The decoder gives up, or a limit is passed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A JPEG without its end; decoders would fill in grey.
    #[error("the file is cut short")]
    CutShort,
    /// It would take so much memory, more than [`MAX_DECODE_BYTES`].
    #[error("it takes {0} bytes of memory")]
    TooLarge(u64),
    /// One of these, as the decoder's process says it.
    #[error("{0}")]
    Told(String),
    /// The decoder's process died twice over it; how, the second time. Somebody else may have ended both.
    #[error("its decoder died: {0}")]
    Died(String),
    /// The decoder did not finish in time, for which the machine may be to blame.
    #[error("its decoder did not finish in time")]
    Slow,
    /// There is no decoder, which says nothing about the file.
    #[error("no decoder can be started: {0}")]
    NotStarted(String),
}

/// A decoded image: 8-bit RGB as stored, and how to turn it for display.
#[derive(Clone)]
pub struct Picture {
    pixels: RgbImage,
    orientation: Orientation,
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture({} x {})", self.width(), self.height())
    }
}

impl Picture {
    /// Decodes a file, in this process. An alpha channel is dropped, 16-bit values are rounded to 8. A file that is given
    /// away does not take up memory beside the decoder's own copy of a JPEG.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(file: impl AsRef<[u8]>, format: Format) -> Result<Self, DecodeError> {
        if format == Format::Jpeg && !jpeg_ends(file.as_ref()) {
            return Err(DecodeError::CutShort);
        }
        let memory = header(file.as_ref(), format).map_or(0, |header| header.memory);
        let mut limits = Limits::default();
        limits.max_image_width = Some(MAX_SIDE_PIXELS);
        limits.max_image_height = Some(MAX_SIDE_PIXELS);
        limits.max_alloc = Some(MAX_DECODE_BYTES);
        let mut reader = ImageReader::with_format(Cursor::new(file), format.decoder());
        reader.limits(limits);
        let mut decoder = reader.into_decoder()?;
        let (width, height) = decoder.dimensions();
        let memory = memory.max(decoder.total_bytes()).max(u64::from(width) * u64::from(height) * 3);
        if memory > MAX_DECODE_BYTES {
            return Err(DecodeError::TooLarge(memory));
        }
        let (orientation, color) = (decoder.orientation()?, decoder.color_type());
        let (pixels, length) = (width as usize * height as usize, decoder.total_bytes() as usize);
        let mut bytes = vec![0; length.max(3 * pixels)];
        decoder.read_image(&mut bytes[..length])?;
        to_rgb(&mut bytes, pixels, color);
        let pixels = RgbImage::from_raw(width, height, bytes).expect("three bytes a pixel are left");
        Ok(Self::new(pixels, orientation))
    }

    pub(crate) fn new(pixels: RgbImage, orientation: Orientation) -> Self {
        Self { pixels, orientation }
    }

    /// As stored, row by row.
    #[cfg(test)]
    pub(crate) fn pixels(&self) -> &[u8] {
        self.pixels.as_raw()
    }

    /// Columns as displayed, in pixels.
    pub fn width(&self) -> u32 {
        if self.lies_on_its_side() { self.pixels.height() } else { self.pixels.width() }
    }

    /// Rows as displayed, in pixels.
    pub fn height(&self) -> u32 {
        if self.lies_on_its_side() { self.pixels.width() } else { self.pixels.height() }
    }

    /// The whole frame, turned for display and squashed to `width` x `height`, see [`resize`].
    ///
    /// It is turned after it was made small: turning the 12 megapixels of a phone's photograph costs more than
    /// the model does. Columns as displayed come first.
    pub fn squash(&self, width: u32, height: u32) -> RgbImage {
        let small = if self.lies_on_its_side() {
            resize::columns(&resize::rows(&self.pixels, width), height)
        } else {
            resize::rows(&resize::columns(&self.pixels, width), height)
        };
        self.turned(small)
    }

    /// For display.
    fn turned(&self, small: RgbImage) -> RgbImage {
        let mut small = DynamicImage::ImageRgb8(small);
        small.apply_orientation(self.orientation);
        small.into_rgb8()
    }

    /// The whole frame, turned for display, with its ratio: its longer side is `side` pixels at most. Quick, and not to the
    /// bit what [`Self::squash`] would give.
    pub fn within(&self, side: u32) -> RgbImage {
        let (width, height) = fit(self.pixels.width(), self.pixels.height(), side);
        self.turned(shrink(&self.pixels, width, height))
    }

    fn lies_on_its_side(&self) -> bool {
        use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
        matches!(self.orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
    }
}

/// `width` and `height` in the same ratio, the longer one `side` at most.
pub(crate) fn fit(width: u32, height: u32, side: u32) -> (u32, u32) {
    let scale = f64::from(side) / f64::from(width.max(height));
    let scaled = |length: u32| ((f64::from(length) * scale.min(1.0)).round() as u32).max(1);
    (scaled(width), scaled(height))
}

/// What a JPEG or a PNG decodes to becomes 8-bit RGB in place: both would take twice as much. There is
/// room for either.
fn to_rgb(bytes: &mut Vec<u8>, pixels: usize, color: ColorType) {
    let (channels, wide) = (usize::from(color.channel_count()), usize::from(color.bytes_per_pixel()));
    let sample = |bytes: &[u8], at: usize| {
        let sixteen = || u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        if wide == channels { bytes[at] } else { ((u32::from(sixteen()) + 128) / 257) as u8 }
    };
    let mut convert = |pixel: usize| {
        // Grey is the one channel, or the first of two.
        let of = |channel: usize| pixel * wide + if channels < 3 { 0 } else { channel * (wide / channels) };
        let rgb = [0, 1, 2].map(|channel| sample(bytes, of(channel)));
        bytes[3 * pixel..3 * pixel + 3].copy_from_slice(&rgb);
    };
    // In the order in which nothing is written before it was read.
    match wide {
        ..3 => (0..pixels).rev().for_each(&mut convert),
        3 => {}
        _ => (0..pixels).for_each(&mut convert),
    }
    bytes.truncate(3 * pixels);
    bytes.shrink_to_fit();
}

fn shrink(pixels: &RgbImage, width: u32, height: u32) -> RgbImage {
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
    let mut small = Image::new(width, height, PixelType::U8x3);
    ImageRef::new(pixels.width(), pixels.height(), pixels.as_raw(), PixelType::U8x3)
        .ok()
        .and_then(|source| Resizer::new().resize(&source, &mut small, &options).ok())
        .and_then(|()| RgbImage::from_raw(width, height, small.into_vec()))
        .expect("both buffers have the size of their images")
}

/// Whether the end marker stands behind the last scan. Inside a scan every 0xFF is escaped, so both markers are
/// what they seem; an embedded thumbnail comes before the first scan of the image itself.
fn jpeg_ends(file: &[u8]) -> bool {
    let last = |marker: u8| file.windows(2).rposition(|pair| pair == [0xff, marker]);
    matches!((last(0xda), last(0xd9)), (Some(scan), Some(end)) if scan < end)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use image::{ExtendedColorType, ImageEncoder, Rgb, codecs::jpeg::JpegEncoder, codecs::png::PngEncoder};

    /// Red on the left, blue on the right, the upper half brighter.
    fn sample(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let value = if y < height / 2 { 250 } else { 120 };
            if x < width / 2 { Rgb([value, 0, 0]) } else { Rgb([0, 0, value]) }
        })
    }

    pub(crate) fn jpeg(width: u32, height: u32, exif_orientation: Option<u8>) -> Vec<u8> {
        let mut file = Vec::new();
        let mut encoder = JpegEncoder::new_with_quality(&mut file, 95);
        if let Some(orientation) = exif_orientation {
            // TIFF header, one entry: tag 0x0112, type SHORT, count 1.
            let mut exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
            exif.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
            encoder.set_exif_metadata(exif).unwrap();
        }
        encoder.encode_image(&sample(width, height)).unwrap();
        file
    }

    fn png(width: u32, height: u32) -> Vec<u8> {
        let mut file = Vec::new();
        PngEncoder::new(&mut file)
            .write_image(&sample(width, height), width, height, ExtendedColorType::Rgb8)
            .unwrap();
        file
    }

    /// As the decoder's own library turns one into the other, in two buffers.
    #[test]
    fn every_kind_becomes_rgb_in_place() {
        use ColorType::{L8, L16, La8, La16, Rgb8, Rgb16, Rgba8, Rgba16};
        let deep = image::ImageBuffer::from_fn(7, 5, |x, y| {
            image::Rgba([x as u16 * 9_001, y as u16 * 13_007, 65_535 - x as u16, 128])
        });
        let deep = DynamicImage::ImageRgba16(deep);
        for color in [L8, La8, Rgb8, Rgba8, L16, La16, Rgb16, Rgba16] {
            let image = match color {
                L8 => deep.to_luma8().into(),
                La8 => deep.to_luma_alpha8().into(),
                Rgb8 => deep.to_rgb8().into(),
                Rgba8 => deep.to_rgba8().into(),
                L16 => deep.to_luma16().into(),
                La16 => deep.to_luma_alpha16().into(),
                Rgb16 => deep.to_rgb16().into(),
                _ => deep.clone(),
            };
            assert_eq!(image.color(), color);
            let mut bytes = image.as_bytes().to_vec();
            bytes.resize(bytes.len().max(3 * 7 * 5), 0);
            to_rgb(&mut bytes, 7 * 5, color);
            assert_eq!(bytes, image.into_rgb8().into_raw(), "{color:?}");
        }
    }

    #[test]
    fn a_cut_file_is_an_error_wherever_it_is_cut() {
        for (file, format) in [(jpeg(96, 80, Some(6)), Format::Jpeg), (png(96, 80), Format::Png)] {
            assert!(Picture::decode(&file, format).is_ok());
            for sixteenth in 0..16 {
                let cut = &file[..file.len() * sixteenth / 16];
                assert!(Picture::decode(cut, format).is_err(), "{format:?} {sixteenth}/16");
            }
        }
    }

    #[test]
    fn limits_hold_before_the_pixels_are_allocated() {
        let gray = |width, height| {
            let mut file = Cursor::new(Vec::new());
            image::GrayImage::new(width, height).write_to(&mut file, image::ImageFormat::Png).unwrap();
            file.into_inner()
        };
        assert!(matches!(
            Picture::decode(gray(12_001, 80), Format::Png),
            Err(DecodeError::Image(ImageError::Limits(_)))
        ));
        let too_large = |file: &[u8]| match Picture::decode(file, Format::Png) {
            Err(DecodeError::TooLarge(memory)) => memory,
            other => panic!("{other:?}"),
        };
        assert_eq!(too_large(&gray(8_000, 5_001)), 3 * 8_000 * 5_001);
        let deep = DynamicImage::new_rgba16(4_000, 4_000);
        let mut file = Cursor::new(Vec::new());
        deep.write_to(&mut file, image::ImageFormat::Png).unwrap();
        assert_eq!(too_large(&file.into_inner()), 8 * 4_000 * 4_000);
        assert!(Picture::decode(png(96, 80), Format::Jpeg).is_err());
    }

    /// Every EXIF orientation shows the same picture as the file that was turned by hand.
    #[test]
    fn the_exif_orientation_is_applied() {
        for exif in 1..=8 {
            let picture = Picture::decode(jpeg(120, 80, Some(exif)), Format::Jpeg).unwrap();
            let mut turned = DynamicImage::ImageRgb8(sample(120, 80));
            turned.apply_orientation(Orientation::from_exif(exif).unwrap());
            assert_eq!((picture.width(), picture.height()), (turned.width(), turned.height()), "{exif}");
            let (small, expected) = (picture.squash(32, 16), shrink(&turned.into_rgb8(), 32, 16));
            let distance = |(a, b): (&u8, &u8)| a.abs_diff(*b);
            assert!(small.iter().zip(expected.iter()).map(distance).max().unwrap() < 32, "{exif}");
        }
        let upright = Picture::decode(jpeg(120, 80, None), Format::Jpeg).unwrap();
        assert_eq!((upright.width(), upright.height()), (120, 80));
    }
}
