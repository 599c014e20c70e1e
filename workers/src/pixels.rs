//! `worker pixels`: what this worker's decoder makes of image files, so that models are trained and evaluated on the pixels
//! that the service gives them. Decoders of JPEG differ, and a probability moves with them.
//!
//! Each file becomes a binary PPM (netpbm `ppm`, `P6`, 8 bits) on standard output, one behind the other: turned as its EXIF
//! orientation says and, with `--size`, squashed. What the service would refuse before the model ends the program.

use std::{
    fs,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use ::image::RgbImage;
use clap::Parser;
use dermflow_schemas::{
    image::{self, ImageBytes, ImageFault},
    limits::MAX_IMAGE_BYTES,
};

use crate::{
    decode::{DecodeError, Picture},
    model::MAX_INPUT_SIDE,
};

/// Writes image files as PPM to standard output, decoded as the service does it.
#[derive(Debug, Parser)]
pub struct Options {
    /// Squash each frame to so many pixels [default: its own].
    #[arg(long, num_args = 2, value_names = ["COLUMNS", "ROWS"])]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_INPUT_SIDE)))]
    size: Option<Vec<u32>>,
    /// JPEG or PNG.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

/// A file gives no pixels.
#[derive(Debug, thiserror::Error)]
#[error("{}: {cause}", file.display())]
pub struct NoPixels {
    file: PathBuf,
    cause: Cause,
}

#[derive(Debug, thiserror::Error)]
enum Cause {
    /// The file cannot be read, or nobody takes the pixels.
    #[error(transparent)]
    File(#[from] io::Error),
    /// The service would not accept it.
    #[error(transparent)]
    Refused(#[from] ImageFault),
    #[error(transparent)]
    Undecodable(#[from] DecodeError),
}

/// Writes them.
///
/// # Errors
/// Of the first file that gives no pixels. Those of the files before it were written.
pub fn run(Options { size, files }: Options) -> Result<(), NoPixels> {
    let size = size.map(|size| (size[0], size[1]));
    let mut out = BufWriter::new(io::stdout().lock());
    for file in files {
        write(&mut out, &file, size).map_err(|cause| NoPixels { file, cause })?;
    }
    Ok(())
}

/// What the service's decoder makes of a file.
///
/// # Errors
/// See [`NoPixels`].
pub fn picture(file: &Path) -> Result<Picture, NoPixels> {
    let read = || opened(fs::read(file)?);
    read().map_err(|cause| NoPixels { file: file.to_owned(), cause })
}

fn write(out: &mut impl Write, path: &Path, size: Option<(u32, u32)>) -> Result<(), Cause> {
    let frame = frame(fs::read(path)?, size)?;
    write!(out, "P6\n{} {}\n255\n", frame.width(), frame.height())?;
    out.write_all(frame.as_raw())?;
    Ok(out.flush()?)
}

fn frame(file: Vec<u8>, size: Option<(u32, u32)>) -> Result<RgbImage, Cause> {
    let picture = opened(file)?;
    let (width, height) = size.unwrap_or((picture.width(), picture.height()));
    Ok(picture.squash(width, height))
}

fn opened(file: Vec<u8>) -> Result<Picture, Cause> {
    if file.len() > MAX_IMAGE_BYTES {
        return Err(ImageFault::TooManyBytes(file.len()).into());
    }
    let file = ImageBytes::from(file);
    let format = image::check(&file)?.format;
    Ok(Picture::decode(file.as_slice(), format)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::tests::jpeg;

    #[test]
    fn a_frame_is_turned_and_squashed_or_keeps_its_size() {
        let file = jpeg(120, 90, Some(6));
        let own = frame(file.clone(), None).unwrap();
        assert_eq!(own.dimensions(), (90, 120));
        // The left half was red and its upper part bright; after a quarter turn to the right that is up, at the right.
        let [top, bottom] = [own.get_pixel(80, 10).0, own.get_pixel(80, 110).0];
        assert!(top[0] > 240 && top[2] < 10 && bottom[0] < 10 && bottom[2] > 240, "{top:?} {bottom:?}");
        let small = frame(file, Some((32, 16))).unwrap();
        assert_eq!(small.dimensions(), (32, 16));
    }

    #[test]
    fn what_the_service_refuses_gives_no_pixels() {
        let mut cut = jpeg(120, 90, None);
        cut.truncate(cut.len() - 2);
        assert!(matches!(frame(cut, None), Err(Cause::Undecodable(_))));
        let small = frame(jpeg(79, 90, None), None);
        assert!(matches!(small, Err(Cause::Refused(ImageFault::TooSmall(79, 90)))));
        let large = frame(vec![0; MAX_IMAGE_BYTES + 1], None);
        assert!(matches!(large, Err(Cause::Refused(ImageFault::TooManyBytes(_)))));
        assert!(matches!(frame(b"GIF89a".to_vec(), None), Err(Cause::Refused(ImageFault::Format))));
    }

    #[test]
    fn the_frame_is_a_ppm() {
        let path = std::env::temp_dir().join(format!("dermflow-pixels-{}.jpg", std::process::id()));
        fs::write(&path, jpeg(96, 80, None)).unwrap();
        let mut out = Vec::new();
        let written = write(&mut out, &path, Some((4, 2)));
        fs::remove_file(&path).unwrap();
        written.unwrap();
        let pixels = out.strip_prefix(b"P6\n4 2\n255\n").expect("a head");
        assert_eq!(pixels, frame(jpeg(96, 80, None), Some((4, 2))).unwrap().as_raw());
    }
}
