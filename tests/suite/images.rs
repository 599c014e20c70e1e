//! Images made to hurt (ASVS 5.2): each is refused with its own code, or analysed, within its time and memory.

use std::{
    fs,
    io::{Cursor, Write},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use dermflow_tests::{
    client::{parameters, sample, sample_bytes},
    lab::{Lab, Setup, Worker},
};
use image::{DynamicImage, ImageEncoder, ImageFormat, RgbImage, codecs::jpeg::JpegEncoder};

/// From request to answer, when nothing is analysed. A build that is not optimised takes longer.
const REFUSED_WITHIN: Duration = Duration::from_millis(if cfg!(debug_assertions) { 2_500 } else { 250 });
/// Just within [`MAX_DECODE_BYTES`](dermflow_schemas::limits::MAX_DECODE_BYTES) with three, four, eight, nine and eleven bytes
/// a pixel.
const LARGEST: (u32, u32) = (6_055, 6_055);
const LARGEST_OF_4: (u32, u32) = (5_244, 5_244);
const LARGEST_OF_8: (u32, u32) = (3_708, 3_708);
const LARGEST_OF_9: (u16, u16) = (3_495, 3_495);
const LARGEST_OF_11: (u16, u16) = (3_162, 3_162);
/// Resident memory of a worker and its decoders, for each of its [`EXECUTORS`], in kB. (A single one takes 240 MB.)
const MEMORY_KB: u64 = 200_000;
const EXECUTORS: u64 = 2;

/// A picture that does not compress to nothing.
fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| image::Rgb([((x * 7) ^ y) as u8, (y * 3) as u8, (x ^ y) as u8]))
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    image.write_to(&mut file, format).expect("memory can be written");
    file.into_inner()
}

fn jpeg() -> Vec<u8> {
    encoded(&picture(160, 120).into(), ImageFormat::Jpeg)
}

fn png() -> Vec<u8> {
    encoded(&picture(160, 120).into(), ImageFormat::Png)
}

/// `count` zeros as a zlib stream (RFC 1950, 1951): one, then again and again the 258 bytes before.
fn zeros(count: usize) -> Vec<u8> {
    let (mut bytes, mut bits, mut filled) = (vec![0x78, 0x01], 0u64, 0);
    // Codes begin with their first bit, other numbers with their last.
    let mut put = |value: u64, length: u32, bytes: &mut Vec<u8>| {
        bits |= value << filled;
        filled += length;
        while filled >= 8 {
            bytes.push(bits as u8);
            bits >>= 8;
            filled -= 8;
        }
    };
    let code = |value: u64, length: u32| value.reverse_bits() >> (64 - length);
    put(1, 1, &mut bytes);
    put(1, 2, &mut bytes);
    for _ in 0..=(count - 1) % 258 {
        put(code(0x30, 8), 8, &mut bytes);
    }
    for _ in 0..(count - 1) / 258 {
        put(code(0xc5, 8), 8, &mut bytes);
        put(0, 5, &mut bytes);
    }
    put(0, 7 + 7, &mut bytes);
    bytes.extend(((count % 65_521) as u32).wrapping_mul(1 << 16).wrapping_add(1).to_be_bytes());
    bytes
}

/// The colour types of a PNG: its number, bits a sample and a pixel.
const BLACK_OR_WHITE: (u8, u8, u32) = (0, 1, 1);
const GREY_AND_ALPHA: (u8, u8, u32) = (4, 8, 16);
const RGBA: (u8, u8, u32) = (6, 8, 32);
const RGBA_16: (u8, u8, u32) = (6, 16, 64);

/// A PNG of one colour: its pixels compress 158 times.
fn flat_png(width: u32, height: u32, (colour, depth, bits): (u8, u8, u32)) -> Vec<u8> {
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[depth, colour, 0, 0, 0]].concat();
    let row = 1 + (width * bits).div_ceil(8) as usize;
    let data = zeros(row * height as usize);
    [&b"\x89PNG\r\n\x1a\n"[..], &chunk(*b"IHDR", &header), &chunk(*b"IDAT", &data), &chunk(*b"IEND", &[])]
        .concat()
}

fn crc(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(crc & 1)))
    };
    !bytes.iter().fold(!0, step)
}

fn chunk(name: [u8; 4], data: &[u8]) -> Vec<u8> {
    let body = [&name[..], data].concat();
    [&(data.len() as u32).to_be_bytes()[..], &body, &crc(&body).to_be_bytes()].concat()
}

/// A PNG with further chunks behind its header.
fn png_with(png: &[u8], chunks: &[Vec<u8>]) -> Vec<u8> {
    [&png[..33], &chunks.concat(), &png[33..]].concat()
}

/// A JPEG with `count` segments of 65,533 bytes, each of which begins with `begin`.
fn jpeg_with(marker: u8, begin: &[u8], count: usize) -> Vec<u8> {
    let jpeg = jpeg();
    let filler = vec![7; 65_533 - begin.len()];
    let segment = [&[0xff, marker, 0xff, 0xff][..], begin, &filler].concat();
    [&jpeg[..2], &segment.repeat(count), &jpeg[2..]].concat()
}

/// A grey progressive JPEG of 2,000 x 2,000 pixels whose AC coefficients are sent `scans` times, each time as nothing.
fn progressive(scans: usize) -> Vec<u8> {
    const SIDE: u16 = 2_000;
    let blocks = 250 * 250;
    let quantisers = [&[0xff, 0xdb, 0, 67, 0][..], &[1; 64]].concat();
    let size = SIDE.to_be_bytes();
    let frame = [&[0xff, 0xc2, 0, 11, 8][..], &size, &size, &[1, 1, 0x11, 0]].concat();
    // One code of one bit each: no difference (DC); the next 2^14 to 2^15 - 1 blocks have no more coefficients (AC).
    let dc = [&[0xff, 0xc4, 0, 20, 0x00, 1][..], &[0; 15], &[0]].concat();
    let ac = [&[0xff, 0xc4, 0, 20, 0x10, 1][..], &[0; 15], &[0xe0]].concat();
    let first = [&[0xff, 0xda, 0, 8, 1, 1, 0, 0, 0, 0][..], &vec![0; blocks / 8 + 1]].concat();
    // Fifteen bits a run: 32,767 blocks, then the rest.
    let rest = (blocks - 32_767 - 16_384) as u16;
    let bits = u32::from((1 << 14) - 1u16) << 16 | u32::from(rest) << 1;
    let again = [&[0xff, 0xda, 0, 8, 1, 1, 0, 1, 63, 0][..], &bits.to_be_bytes()].concat();
    // What looks like a marker inside of a scan is escaped.
    let again = [
        &again[..10],
        &again[10..]
            .iter()
            .flat_map(|byte| if *byte == 0xff { vec![0xff, 0] } else { vec![*byte] })
            .collect::<Vec<_>>(),
    ]
    .concat();
    [&[0xff, 0xd8][..], &quantisers, &frame, &dc, &ac, &first, &again.repeat(scans), &[0xff, 0xd9]].concat()
}

fn large_jpeg() -> Vec<u8> {
    encoded(&RgbImage::new(LARGEST.0, LARGEST.1).into(), ImageFormat::Jpeg)
}

/// 9 MB of them, behind the start of an image.
fn with_comments(jpeg: &[u8]) -> Vec<u8> {
    let comments = [&[0xff, 0xfe, 0xff, 0xff][..], &vec![0; 65_533]].concat().repeat(137);
    [&jpeg[..2], &comments, &jpeg[2..]].concat()
}

/// A progressive JPEG of one colour, in as many components at the full size: its decoder keeps two bytes of every component
/// for every pixel.
fn progressive_of((width, height): (u16, u16), components: u8) -> Vec<u8> {
    let quantisers = [&[0xff, 0xdb, 0, 67, 0][..], &[1; 64]].concat();
    let size = [height.to_be_bytes(), width.to_be_bytes()].concat();
    let frame = [&[0xff, 0xc2, 0, 8 + 3 * components, 8][..], &size, &[components]].concat();
    let kinds: Vec<u8> = (1..=components).flat_map(|id| [id, 0x11, 0]).collect();
    let codes = [&[0xff, 0xc4, 0, 20, 0, 1][..], &[0; 15], &[0]].concat();
    let scanned: Vec<u8> = (1..=components).flat_map(|id| [id, 0]).collect();
    let scan = [&[0xff, 0xda, 0, 6 + 2 * components, components][..], &scanned, &[0, 0, 0]].concat();
    // Of each block of each component: no difference; a bit.
    let blocks = usize::from(width).div_ceil(8) * usize::from(height).div_ceil(8);
    let data = vec![0; (blocks * usize::from(components)).div_ceil(8)];
    [&[0xff, 0xd8][..], &quantisers, &frame, &kinds, &codes, &scan, &data, &[0xff, 0xd9]].concat()
}

/// A baseline JPEG of one colour whose three components come one after the other: its decoder keeps as much of it.
fn in_several_scans((width, height): (u16, u16)) -> Vec<u8> {
    let quantisers = [&[0xff, 0xdb, 0, 67, 0][..], &[1; 64]].concat();
    let size = [height.to_be_bytes(), width.to_be_bytes()].concat();
    let frame = [&[0xff, 0xc0, 0, 17, 8][..], &size, &[3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0]].concat();
    let code = |class: u8| [&[0xff, 0xc4, 0, 20, class, 1][..], &[0; 15], &[0]].concat();
    let codes = [code(0), code(0x10)].concat();
    // Of each block: no difference, no coefficients; a bit each.
    let blocks = usize::from(width).div_ceil(8) * usize::from(height).div_ceil(8);
    let scans = (1..=3).flat_map(|id| {
        let head = [0xff, 0xda, 0, 8, 1, id, 0, 0, 63, 0];
        head.into_iter().chain(vec![0; (blocks * 2).div_ceil(8)])
    });
    let scans: Vec<u8> = scans.collect();
    [&[0xff, 0xd8][..], &quantisers, &frame, &codes, &scans, &[0xff, 0xd9]].concat()
}

/// JPEGs that nothing here decodes: lossless, differential, arithmetic-coded, and of 12 bits a sample.
fn odd_jpegs() -> impl Iterator<Item = Vec<u8>> {
    let file = jpeg();
    let frame = file.windows(2).position(|pair| pair == [0xff, 0xc0]).expect("a frame");
    let kinds = [0xc3, 0xc5, 0xc6, 0xc7, 0xc9, 0xca, 0xcb, 0xcd, 0xce, 0xcf].map(|kind| (frame + 1, kind));
    kinds.into_iter().chain([(frame + 4, 12)]).map(move |(at, byte)| {
        let mut file = file.clone();
        file[at] = byte;
        file
    })
}

/// Four components, as printers have them.
fn cmyk() -> Vec<u8> {
    let quantisers = [&[0xff, 0xdb, 0, 67, 0][..], &[1; 64]].concat();
    let frame = [&[0xff, 0xc0, 0, 20, 8][..], &[0, 96, 0, 96, 4]].concat();
    let components: Vec<u8> = (1..=4).flat_map(|id| [id, 0x11, 0]).collect();
    let code = |class: u8| [&[0xff, 0xc4, 0, 20, class, 1][..], &[0; 15], &[0]].concat();
    let scan = [0xff, 0xda, 0, 14, 4, 1, 0, 2, 0, 3, 0, 4, 0, 0, 63, 0];
    // Of each block of each component: no difference, no coefficients; a bit each.
    let data = vec![0; 12 * 12 * 4 * 2 / 8];
    let adobe = [0xff, 0xee, 0, 14, b'A', b'd', b'o', b'b', b'e', 0, 100, 0, 0, 0, 0, 0];
    [
        &[0xff, 0xd8][..],
        &adobe,
        &quantisers,
        &frame,
        &components,
        &code(0),
        &code(0x10),
        &scan,
        &data,
        &[0xff, 0xd9],
    ]
    .concat()
}

fn sixteen_bits() -> Vec<u8> {
    let image = DynamicImage::ImageRgb8(picture(160, 120)).into_rgb16();
    encoded(&image.into(), ImageFormat::Png)
}

fn turned(orientation: u8) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = JpegEncoder::new(&mut file);
    let mut exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
    encoder.set_exif_metadata(exif).expect("JPEG has EXIF");
    encoder.encode_image(&picture(160, 120)).expect("memory can be written");
    file
}

/// A PNG with a colour profile that unpacks to 100 MB.
fn profile_bomb(png: &[u8]) -> Vec<u8> {
    png_with(png, &[chunk(*b"iCCP", &[b"profile\0\0", &zeros(100_000_000)[..]].concat())])
}

/// 110 MB of pixels, and that.
pub(crate) fn memory_bomb() -> Vec<u8> {
    profile_bomb(&flat_png(LARGEST_OF_4.0, LARGEST_OF_4.1, RGBA))
}

/// An APNG that promises a million frames of the largest size.
fn frame_bomb() -> Vec<u8> {
    let control = chunk(*b"acTL", &[1_000_000u32.to_be_bytes(), 0u32.to_be_bytes()].concat());
    let frame: Vec<u8> =
        [0u32, 160, 120, 0, 0].into_iter().flat_map(u32::to_be_bytes).chain([0; 6]).collect();
    let png = png_with(&png(), &[control]);
    let end = png.len() - 12;
    let mut frames = png[..end].to_vec();
    for number in 0..2_000u32 {
        let numbered = [&number.to_be_bytes()[..], &frame[4..]].concat();
        frames.write_all(&chunk(*b"fcTL", &numbered)).expect("memory can be written");
    }
    [&frames[..], &png[end..]].concat()
}

/// The most memory that a process has had, in kB.
fn peak_kb(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().unwrap_or(u64::MAX)
}

fn children(of: u32) -> Result<Vec<u32>> {
    let text = fs::read_dir(format!("/proc/{of}/task"))?
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok())
        .collect::<String>();
    Ok(text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect())
}

/// A name, a file, and the answers that it may get: status and code.
type Case<'a> = (&'a str, Vec<u8>, &'a [(u16, &'a str)]);

/// As large as may be, and larger, of every kind that takes its decoder another share of its memory.
fn sizes() -> Vec<Case<'static>> {
    vec![
        ("the largest size in one bit", flat_png(LARGEST.0, LARGEST.1, BLACK_OR_WHITE), &[(200, "")]),
        ("a row more", flat_png(LARGEST.0, LARGEST.1 + 1, BLACK_OR_WHITE), &[(422, "image-too-large")]),
        ("a JPEG with 9 MB of comments", with_comments(&large_jpeg()), &[(200, "")]),
        ("in grey with alpha", flat_png(LARGEST.0, LARGEST.1, GREY_AND_ALPHA), &[(200, "")]),
        ("with alpha", flat_png(LARGEST_OF_4.0, LARGEST_OF_4.1, RGBA), &[(200, "")]),
        ("in 16 bits with alpha", flat_png(LARGEST_OF_8.0, LARGEST_OF_8.1, RGBA_16), &[(200, "")]),
        (
            "a row more",
            flat_png(LARGEST_OF_8.0, LARGEST_OF_8.1 + 1, RGBA_16),
            &[(422, "image-kind-too-large")],
        ),
        ("progressive", progressive_of(LARGEST_OF_9, 3), &[(200, "")]),
        ("in several scans", in_several_scans(LARGEST_OF_9), &[(200, "")]),
        ("in several scans, larger", in_several_scans((3_496, 3_497)), &[(422, "image-kind-too-large")]),
        (
            "progressive in four colours, with 9 MB of comments",
            with_comments(&progressive_of(LARGEST_OF_11, 4)),
            &[(200, "")],
        ),
        (
            "progressive, of the size that a baseline JPEG may have",
            progressive_of((6_055, 6_055), 1),
            &[(422, "image-kind-too-large")],
        ),
        ("a height that comes behind the pixels", progressive_of((4_000, 0), 1), &[(422, "image-too-small")]),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn images_made_to_hurt_are_refused_or_analysed() -> Result<()> {
    let worker = Worker::derm7().arg("--executors", &EXECUTORS.to_string());
    let lab = Lab::start(Setup { workers: vec![worker], ..Setup::default() }).await?;
    let polyglot = [jpeg(), b"PK\x03\x04\x14\0\0\0\0\0".repeat(100)].concat();
    let gif = [
        &b"GIF89a\x10\x27\x10\x27\x80\0\0"[..],
        &b"!\xf9\x04\0\0\0\0\0,\0\0\0\0\x10\x27\x10\x27\0\x02\0".repeat(5_000),
    ]
    .concat();
    let svg =
        b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='1e9' height='1e9'/>".to_vec();
    let mut cases: Vec<Case<'_>> = vec![
        (
            "30,000 x 30,000 PNG of one colour",
            flat_png(30_000, 30_000, BLACK_OR_WHITE),
            &[(422, "image-too-large")],
        ),
        ("1 x 1", flat_png(1, 1, RGBA), &[(422, "image-too-small")]),
        ("GIF of 5,000 frames", gif, &[(422, "image-format")]),
        ("APNG of a million frames", frame_bomb(), &[(200, ""), (422, "image-undecodable")]),
        ("SVG", svg, &[(422, "image-format")]),
        ("JPEG that is a ZIP as well", polyglot, &[(200, "")]),
        ("ZIP that is a JPEG as well", [b"PK\x03\x04".to_vec(), jpeg()].concat(), &[(422, "image-format")]),
        ("PNG with HTML behind it", [png(), b"<script>alert(1)</script>".to_vec()].concat(), &[(200, "")]),
        ("progressive with 1,000 scans", progressive(1_000), &[(200, ""), (422, "image-undecodable")]),
        (
            "10 MB of colour profiles",
            jpeg_with(0xe2, b"ICC_PROFILE\0\x01\x9f", 159),
            &[(200, ""), (422, "image-undecodable")],
        ),
        (
            "10 MB of EXIF",
            jpeg_with(0xe1, b"Exif\0\0II*\0\x08\0\0\0", 159),
            &[(200, ""), (422, "image-undecodable")],
        ),
        ("a profile of 100 MB in 600 kB", profile_bomb(&png()), &[(200, ""), (422, "image-undecodable")]),
        ("CMYK", cmyk(), &[(200, "")]),
        ("16 bits", sixteen_bits(), &[(200, "")]),
        ("NUL", vec![0; 1_000], &[(422, "image-format")]),
        (
            "NUL in the middle",
            {
                let mut file = jpeg();
                let half = file.len() / 2;
                file[half..].fill(0);
                file
            },
            &[(422, "image-undecodable")],
        ),
    ];
    cases.extend(sizes());
    cases.extend(odd_jpegs().map(|file| ("a JPEG of another kind", file, &[(422, "image-header")][..])));
    cases.extend((1..=8).map(|orientation| ("turned by EXIF", turned(orientation), &[(200, "")][..])));
    for file in [sample_bytes("ham10000-mel.jpg"), png()] {
        for sixteenth in 1..16 {
            let cut = file[..file.len() * sixteenth / 16].to_vec();
            cases.push(("cut short", cut, &[(422, "image-undecodable"), (422, "image-header")]));
        }
    }
    for (name, file, expected) in cases {
        let (bytes, request) = (file.len(), parameters(&[file]));
        let begun = Instant::now();
        let answer = lab.client().analyze(&request, &[]).await?;
        let took = begun.elapsed();
        println!("{name}: {bytes} bytes, {} {} in {took:?}", answer.status, answer.code());
        ensure!(expected.contains(&(answer.status, answer.code())), "{name}: {}", answer.text);
        ensure!(answer.status == 200 || took <= REFUSED_WITHIN, "{name}: refused after {took:?}");
    }
    let good = lab.client().analyze(&sample("isic2017-nv.jpg"), &[]).await?;
    ensure!(good.status == 200, "{}", good.text);
    for (name, pid) in lab.pids().into_iter().filter(|(name, _)| name.starts_with("worker")) {
        let decoders = children(pid)?;
        ensure!(decoders.len() as u64 == EXECUTORS, "a decoder an executor: {decoders:?}");
        // Each may have had any of the images.
        let (worker, decoder) = (peak_kb(pid), decoders.into_iter().map(peak_kb).max().unwrap_or(u64::MAX));
        println!("{name}: {worker} kB at its peak, a decoder {decoder}");
        let each = worker / EXECUTORS + decoder;
        ensure!(each <= MEMORY_KB, "{each} kB an executor");
    }
    let logs = lab.logs()?;
    assert!(!logs.contains("\"message\":\"panic\""), "something has panicked");
    assert!(!logs.contains("a decoder has died"), "a decoder has died");
    assert_eq!(lab.messages("DEAD").await?, 0);
    lab.stop().await
}
