//! Checks on image bytes that need no decoding: strict Base64, magic number, size from the header.

use std::fmt;

use aws_lc_rs::digest;
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use image::ImageFormat;
use serde::{Deserialize, Serialize};

use crate::limits::{MAX_DECODE_BYTES, MAX_IMAGE_BYTES, MAX_PIXELS, MAX_SIDE_PIXELS, MIN_SIDE_PIXELS};

/// An image file's bytes, cheap to clone. `Debug` prints their length and the start of their SHA-256, never the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct ImageBytes(Bytes);

impl ImageBytes {
    /// The file.
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }

    /// The digest of the file, in lower-case hexadecimal.
    pub fn sha256(&self) -> String {
        hex(digest::digest(&digest::SHA256, &self.0).as_ref())
    }

    /// The SHA-1 that FHIR R4's `Attachment.hash` asks for, in Base64. A checksum, not a protection.
    pub fn sha1_base64(&self) -> String {
        STANDARD.encode(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &self.0))
    }
}

impl<B: Into<Bytes>> From<B> for ImageBytes {
    fn from(bytes: B) -> Self {
        Self(bytes.into())
    }
}

impl fmt::Debug for ImageBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageBytes({} bytes, sha256 {}…)", self.0.len(), &self.sha256()[..8])
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The formats we take, told by their magic number, whatever the request calls them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    /// JPEG (ITU-T T.81).
    #[serde(rename = "image/jpeg")]
    Jpeg,
    /// PNG (W3C PNG, third edition).
    #[serde(rename = "image/png")]
    Png,
}

impl Format {
    /// The media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Jpeg => "image/jpeg",
            Self::Png => "image/png",
        }
    }

    /// The same format as the decoder calls it.
    pub fn decoder(self) -> ImageFormat {
        match self {
            Self::Jpeg => ImageFormat::Jpeg,
            Self::Png => ImageFormat::Png,
        }
    }

    fn sniff(bytes: &[u8]) -> Option<Self> {
        if bytes.starts_with(b"\xff\xd8\xff") {
            Some(Self::Jpeg)
        } else if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
            Some(Self::Png)
        } else {
            None
        }
    }
}

/// What an image's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// By magic number.
    pub format: Format,
    /// Columns, in pixels, as stored (before any EXIF orientation).
    pub width: u32,
    /// Rows, in pixels, as stored.
    pub height: u32,
    /// Bytes that a decoder takes for the pixels, see [`MAX_DECODE_BYTES`].
    pub memory: u64,
}

/// What is wrong with an image, as far as its Base64 and its header tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ImageFault {
    /// Not RFC 4648 §4 Base64: standard alphabet, padded, no white space, no `data:` prefix.
    #[error("first fault at character {0}")]
    NotBase64(usize),
    /// More than [`MAX_IMAGE_BYTES`].
    #[error("{0} bytes, at most {MAX_IMAGE_BYTES}")]
    TooManyBytes(usize),
    /// Neither JPEG nor PNG.
    #[error("neither the magic number of JPEG nor of PNG")]
    Format,
    /// The magic number is right, the header behind it cannot be read; or it is of a JPEG that nothing here decodes.
    #[error(
        "no header of a PNG, or of a baseline or progressive JPEG with Huffman codes and 8 bits a sample"
    )]
    Header,
    /// A side is below [`MIN_SIDE_PIXELS`].
    #[error("{0} x {1} pixels, at least {MIN_SIDE_PIXELS} a side")]
    TooSmall(u32, u32),
    /// A side is above [`MAX_SIDE_PIXELS`] or the area above [`MAX_PIXELS`].
    #[error("{0} x {1} pixels, at most {MAX_SIDE_PIXELS} a side and {MAX_PIXELS} in all")]
    TooLarge(u32, u32),
    /// It is of a kind that takes its decoder more than [`MAX_DECODE_BYTES`], here so many.
    #[error("{0} bytes of memory to decode it, at most {MAX_DECODE_BYTES}")]
    KindTooLarge(u64),
}

/// Decodes strict Base64 (RFC 4648 §4), refusing what would be too large before it is allocated.
///
/// # Errors
/// [`ImageFault::NotBase64`] with the offset of the first bad character, or [`ImageFault::TooManyBytes`].
pub fn decode_base64(text: &str) -> Result<ImageBytes, ImageFault> {
    let length = text.len() / 4 * 3;
    if length > MAX_IMAGE_BYTES + 2 {
        return Err(ImageFault::TooManyBytes(length));
    }
    let bytes = STANDARD.decode(text).map_err(|_| ImageFault::NotBase64(first_fault(text)))?;
    if bytes.len() > MAX_IMAGE_BYTES {
        return Err(ImageFault::TooManyBytes(bytes.len()));
    }
    Ok(bytes.into())
}

/// Where the first fault is in what does not decode, which need not be the one that the decoder has met first: a character
/// out of the alphabet, or padding before the end; else the end, when it is not that of a group of four; else a last
/// symbol with bits that no byte has.
fn first_fault(text: &str) -> usize {
    let padding = text.bytes().rev().take(2).take_while(|byte| *byte == b'=').count();
    let body = &text.as_bytes()[..text.len() - padding];
    let strange =
        body.iter().position(|byte| !matches!(byte, b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'+' | b'/'));
    strange.unwrap_or_else(|| {
        if text.len().is_multiple_of(4) { body.len().saturating_sub(1) } else { text.len() }
    })
}

/// Reads an image's header and holds it against the limits.
///
/// # Errors
/// An [`ImageFault`] other than those of Base64.
pub fn check(image: &ImageBytes) -> Result<Header, ImageFault> {
    let format = Format::sniff(&image.0).ok_or(ImageFault::Format)?;
    let header = header(&image.0, format).ok_or(ImageFault::Header)?;
    let Header { width, height, memory, .. } = header;
    if width < MIN_SIDE_PIXELS || height < MIN_SIDE_PIXELS {
        return Err(ImageFault::TooSmall(width, height));
    }
    let area = u64::from(width) * u64::from(height);
    if width > MAX_SIDE_PIXELS || height > MAX_SIDE_PIXELS || area > MAX_PIXELS {
        return Err(ImageFault::TooLarge(width, height));
    }
    if memory > MAX_DECODE_BYTES {
        return Err(ImageFault::KindTooLarge(memory));
    }
    Ok(header)
}

/// What the header of a file says; `None` when it cannot be read.
pub fn header(file: &[u8], format: Format) -> Option<Header> {
    let (width, height, memory) = match format {
        Format::Jpeg => jpeg_frame(file)?,
        Format::Png => png_header(file)?,
    };
    Some(Header { format, width, height, memory })
}

/// Columns and rows of a PNG (third edition, 11.2.1), and what its pixels take: `IHDR` comes first, and before the pixels a
/// `tRNS`, if a colour of it is none. Nothing is unpacked, such as a colour profile.
fn png_header(file: &[u8]) -> Option<(u32, u32, u64)> {
    let number = |at: usize| Some(u32::from_be_bytes(file.get(at..at + 4)?.try_into().ok()?));
    let is_header = number(8)? == 13 && file.get(12..16)? == b"IHDR" && file.len() >= 33;
    let (width, height, depth) = (number(16)?, number(20)?, *file.get(24)?);
    let mut at = 33;
    let has_transparency = loop {
        match file.get(at + 4..at + 8) {
            Some(b"tRNS") => break true,
            None | Some(b"IDAT") => break false,
            Some(_) => at = at.saturating_add(number(at)? as usize).saturating_add(12),
        }
    };
    let channels = match (*file.get(25)?, has_transparency) {
        (0, false) => 1,
        (0, true) | (4, _) => 2,
        (2 | 3, false) => 3,
        _ => 4,
    };
    let each = (channels * u64::from(depth.div_ceil(8))).max(3);
    let area = u64::from(width).saturating_mul(height.into());
    is_header.then_some((width, height, area.saturating_mul(each)))
}

/// Columns and rows of a JPEG (T.81, B.2.2), and what its pixels take: from the frame header of a Huffman-coded image of 8
/// bits, which the decoder takes, behind any number of other segments, and from the first scan. One that comes in several
/// scans has all of its coefficients kept.
fn jpeg_frame(file: &[u8]) -> Option<(u32, u32, u64)> {
    let number = |at: usize| Some(u16::from_be_bytes(file.get(at..at + 2)?.try_into().ok()?));
    let (mut at, mut frame) = (2, None);
    loop {
        if *file.get(at)? != 0xff {
            // Decoders pass over what some cameras leave between segments.
            at += 1;
            continue;
        }
        match *file.get(at + 1)? {
            // Any number of these may stand before a marker.
            0xff => at += 1,
            kind @ 0xc0..=0xc2 if frame.is_none() => {
                let length = number(at + 2)?;
                if length < 8 || *file.get(at + 4)? != 8 {
                    return None;
                }
                frame = Some((at, kind == 0xc2));
                at += 2 + usize::from(length);
            }
            0xda => {
                let (frame, is_progressive) = frame?;
                let [height, width] = [number(frame + 5)?, number(frame + 7)?].map(u32::from);
                let area = u64::from(width) * u64::from(height);
                let is_kept = is_progressive || file.get(at + 4)? < file.get(frame + 9)?;
                let coefficients = if is_kept { coefficients(file.get(frame + 9..)?, area)? } else { 0 };
                return Some((width, height, 3 * area + 2 * coefficients));
            }
            // Other frames decoders pass over, like anything else.
            0xd9 => return None,
            // What is escaped is no marker.
            0x00 => at += 2,
            _ => at += 2 + usize::from(number(at + 2)?.max(2)),
        }
    }
}

/// The coefficients of all components of a JPEG, from their number on (T.81, B.2.2): `area` of those that are sampled as
/// often as any, fewer of others.
fn coefficients(frame: &[u8], area: u64) -> Option<u64> {
    let number = usize::from(*frame.first()?);
    let sampling = frame.get(1..=3 * number)?.chunks_exact(3).map(|component| component[1]);
    let sides = sampling.map(|both| (u64::from(both >> 4), u64::from(both & 15)));
    let most = |side: fn((u64, u64)) -> u64| sides.clone().map(side).max().unwrap_or(0).max(1);
    let all: u64 = sides.clone().map(|(across, down)| across * down).sum();
    Some((area * all).div_ceil(most(|sides| sides.0) * most(|sides| sides.1)))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn png(width: u32, height: u32) -> ImageBytes {
        let mut file = Cursor::new(Vec::new());
        image::GrayImage::new(width, height).write_to(&mut file, ImageFormat::Png).unwrap();
        file.into_inner().into()
    }

    #[test]
    fn base64_is_strict() {
        assert_eq!(decode_base64("AAEC").unwrap().as_slice(), [0, 1, 2]);
        let bad = [
            ("data:image/png;base64,AAEC", 4),
            ("AAE C", 3),
            ("AAEC\n", 4),
            ("AA-_", 2),
            ("AAE", 3),
            ("AA==AA==", 2),
            ("AB==", 1),
            // The first one of several, whatever a decoder meets first.
            ("A!AAA", 1),
            ("AAAA!AAA====", 4),
            ("!AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA AAA", 0),
            ("AAA=====", 3),
            ("=", 1),
            ("A=B=", 1),
        ];
        for (text, at) in bad {
            assert_eq!(decode_base64(text), Err(ImageFault::NotBase64(at)), "{text}");
        }
    }

    #[test]
    fn an_image_of_the_limit_passes_and_one_byte_more_does_not() {
        let full = STANDARD.encode(vec![0; MAX_IMAGE_BYTES]);
        assert_eq!(decode_base64(&full).unwrap().as_slice().len(), MAX_IMAGE_BYTES);
        let over = STANDARD.encode(vec![0; MAX_IMAGE_BYTES + 1]);
        assert!(matches!(decode_base64(&over), Err(ImageFault::TooManyBytes(_))));
    }

    #[test]
    fn sizes_are_read_from_the_header_and_held_against_the_limits() {
        let header = Header { format: Format::Png, width: 80, height: 81, memory: 3 * 80 * 81 };
        assert_eq!(check(&png(80, 81)), Ok(header));
        assert_eq!(check(&png(79, 100)), Err(ImageFault::TooSmall(79, 100)));
        assert_eq!(check(&png(12_001, 80)), Err(ImageFault::TooLarge(12_001, 80)));
        assert_eq!(check(&png(6_400, 6_400)), Err(ImageFault::TooLarge(6_400, 6_400)));
        assert_eq!(check(&b"GIF89a".to_vec().into()), Err(ImageFault::Format));
        assert_eq!(check(&b"\xff\xd8\xff\xe0".to_vec().into()), Err(ImageFault::Header));
    }

    /// A header that promises 30,000 x 30,000 pixels is refused without allocating them.
    #[test]
    fn a_bomb_is_refused_by_its_header() {
        let mut bomb = png(100, 100).as_slice().to_vec();
        let largest = [&bomb[..16], &[0xff; 8], &bomb[24..]].concat();
        assert_eq!(check(&largest.into()), Err(ImageFault::TooLarge(u32::MAX, u32::MAX)));
        bomb[16..20].copy_from_slice(&30_000u32.to_be_bytes());
        bomb[20..24].copy_from_slice(&30_000u32.to_be_bytes());
        let crc = crc32fast::hash(&bomb[12..29]);
        bomb[29..33].copy_from_slice(&crc.to_be_bytes());
        assert_eq!(check(&bomb.into()), Err(ImageFault::TooLarge(30_000, 30_000)));
    }

    #[test]
    fn what_takes_more_memory_may_have_fewer_pixels() {
        let mut file = Cursor::new(Vec::new());
        image::RgbImage::new(4_000, 4_000).write_to(&mut file, ImageFormat::Jpeg).unwrap();
        let jpeg = file.into_inner();
        let [frame, scan] =
            [0xc0, 0xda].map(|marker| jpeg.windows(2).position(|pair| pair == [0xff, marker]).unwrap());
        let png = png(4_000, 4_000).0;
        let memory = |file: &[u8], changes: &[(usize, u8)]| {
            let mut file = file.to_vec();
            for (at, byte) in changes {
                file[*at] = *byte;
            }
            match check(&file.into()) {
                Ok(Header { memory, .. }) => (memory / 16_000_000, true),
                Err(ImageFault::KindTooLarge(memory)) => (memory / 16_000_000, false),
                other => panic!("{other:?}"),
            }
        };
        // Depth and colour type.
        for (depth, colour, expected) in [
            (1, 0, (3, true)),
            (8, 0, (3, true)),
            (8, 3, (3, true)),
            (8, 4, (3, true)),
            (8, 6, (4, true)),
            (16, 0, (3, true)),
            (16, 4, (4, true)),
            (16, 2, (6, true)),
            (16, 6, (8, false)),
        ] {
            assert_eq!(memory(&png, &[(24, depth), (25, colour)]), expected, "{depth} {colour}");
        }
        let clear = [&png[..33], b"\0\0\0\x02tRNS\0\0\0\0\0\0", &png[33..]].concat();
        for (colour, expected) in [(0, 3), (2, 4), (3, 4)] {
            assert_eq!(memory(&clear, &[(25, colour)]), (expected, true), "{colour}");
        }
        let sampling = |first, others| [(frame + 11, first), (frame + 14, others), (frame + 17, others)];
        assert_eq!(memory(&jpeg, &sampling(0x11, 0x11)), (3, true));
        for (first, others, expected) in
            [(0x11, 0x11, (9, false)), (0x21, 0x11, (7, false)), (0x22, 0x11, (6, true))]
        {
            // Progressive, or the first scan has one component.
            for kept in [(frame + 1, 0xc2), (scan + 4, 1)] {
                let changes = [&sampling(first, others)[..], &[kept]].concat();
                assert_eq!(memory(&jpeg, &changes), expected, "{first:x} {others:x} {kept:?}");
            }
        }
    }

    /// However much stands before the size, and whatever it unpacks to.
    #[test]
    fn what_stands_before_the_size_is_passed_over() {
        let mut file = Cursor::new(Vec::new());
        image::GrayImage::new(90, 80).write_to(&mut file, ImageFormat::Jpeg).unwrap();
        let jpeg = file.into_inner();
        let profile = [&[0xff, 0xff, 0xe2, 0xff, 0xff][..], &vec![7; 65_533]].concat();
        let long = [&jpeg[..2], &profile.repeat(150), &jpeg[2..]].concat();
        let header = Header { format: Format::Jpeg, width: 90, height: 80, memory: 3 * 90 * 80 };
        assert_eq!(check(&long.into()), Ok(header));
        let frame = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
        // Lossless, differential, arithmetic: nothing that is decoded.
        for kind in (0xc3..=0xcf).filter(|kind| ![0xc4, 0xc8, 0xcc].contains(kind)) {
            let mut odd = jpeg.clone();
            odd[frame + 1] = kind;
            assert_eq!(check(&odd.into()), Err(ImageFault::Header), "{kind:x}");
        }
        for length in 0..jpeg.len() {
            let _ = check(&jpeg[..length].to_vec().into());
            let _ = check(&png(80, 80).0[..length.min(40)].to_vec().into());
        }
    }

    #[test]
    fn debug_shows_no_pixel() {
        let shown = format!("{:?}", ImageBytes::from(b"secret pixels".to_vec()));
        assert!(shown.starts_with("ImageBytes(13 bytes, sha256 "), "{shown}");
        assert!(!shown.contains("secret"));
    }
}
