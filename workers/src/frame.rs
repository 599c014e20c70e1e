//! What is left of an image once it is decoded, whatever its size was: all that an analysis takes.

use std::time::Instant;

use dermflow_schemas::image::Format;
use image::RgbImage;

use crate::{
    child,
    decode::{DecodeError, Picture, fit},
};

/// The longer side of a thumbnail, in pixels. Smaller images keep their size.
const THUMBNAIL_SIDE: u32 = 256;

/// An image as a model sees it, as its quality is measured on it, and how large it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Columns of the image as displayed, in pixels.
    pub width: u32,
    /// Rows of it.
    pub height: u32,
    /// The whole of it, squashed to a model's input.
    pub squashed: RgbImage,
    /// The whole of it with its ratio, its longer side 256 pixels at most.
    pub thumbnail: RgbImage,
}

impl Frame {
    /// What is left of `picture` for a model with an input of so many columns and rows.
    pub fn of(picture: &Picture, (columns, rows): (u32, u32)) -> Self {
        Self {
            width: picture.width(),
            height: picture.height(),
            squashed: picture.squash(columns, rows),
            thumbnail: picture.within(THUMBNAIL_SIDE),
        }
    }

    /// Decodes a file for a model with such an `input`, by `deadline`, in a process of its own on a thread that has one
    /// (see [`Decoding`](crate::child::Decoding)); else here, for as long as it takes.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(
        file: &[u8],
        format: Format,
        input: (u32, u32),
        deadline: Instant,
    ) -> Result<Self, DecodeError> {
        child::decode(file, format, input, deadline)
            .unwrap_or_else(|| Ok(Self::of(&Picture::decode(file, format)?, input)))
    }

    /// Columns and rows of the thumbnail of an image.
    pub(crate) fn thumbnail_size(width: u32, height: u32) -> (u32, u32) {
        fit(width, height, THUMBNAIL_SIDE)
    }
}
