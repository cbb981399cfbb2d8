//! The header before each frame (`struct virtio_net_hdr_v1`, virtio 1.2, 5.1.6).

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable
    )
)]

use std::ops::RangeInclusive;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// The size of the header in bytes; the tap uses the same.
pub const HEADER_SIZE: usize = 12;
/// Where the number of buffers of a received frame is.
pub const NUM_BUFFERS: usize = 10;

/// The sizes of segments that a driver may ask for. Linux never makes smaller ones
/// (`TCP_MIN_SND_MSS`), and the host would have to make 65 000 packets of one frame; the value
/// after the last means something else to the host's kernel (`GSO_BY_FRAGS`).
const SEGMENTS: RangeInclusive<u16> = 48..=u16::MAX - 1;

/// What a driver asks for with a frame that it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

/// Why a driver's header is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// A segmentation that was not negotiated or is none.
    #[error("segmentation type {0:#x} is not available")]
    GsoType(u8),
    /// Segmentation without a possible segment size or without a checksum.
    #[error("segmentation without a possible segment size or checksum")]
    Gso,
    /// The checksum would be outside the frame, or was not negotiated.
    #[error("checksum at {start} + {offset} of a frame of {frame} bytes")]
    Checksum {
        /// Where summing starts.
        start: u16,
        /// Where the sum goes, from `start`.
        offset: u16,
        /// The frame's length in bytes.
        frame: usize,
    },
    /// The frame is shorter than its headers.
    #[error("headers of {headers} bytes in a frame of {frame} bytes")]
    HeaderLength {
        /// Bytes of headers.
        headers: u16,
        /// The frame's length in bytes.
        frame: usize,
    },
}

impl Header {
    /// Checks a driver's header for a frame of `frame` bytes (without header)
    /// against the features that the driver accepted. Flags that a driver has
    /// no use for are ignored, as 5.1.6.2.2 asks.
    ///
    /// # Errors
    /// [`HeaderError`].
    pub fn check(
        bytes: &[u8; HEADER_SIZE],
        frame: usize,
        features: u64,
    ) -> Result<Self, HeaderError> {
        let [flags, gso_type, a, b, c, d, e, f, g, h, ..] = *bytes;
        let word = |low, high| u16::from_le_bytes([low, high]);
        let has = |feature: u32| features & (1 << feature) != 0;
        let mut header = Self {
            flags: flags & VIRTIO_NET_HDR_F_NEEDS_CSUM as u8,
            gso_type,
            hdr_len: word(a, b),
            gso_size: word(c, d),
            csum_start: word(e, f),
            csum_offset: word(g, h),
        };
        if header.flags == 0 {
            header.csum_start = 0;
            header.csum_offset = 0;
        } else {
            let start = usize::from(header.csum_start);
            let end = start
                .saturating_add(header.csum_offset.into())
                .saturating_add(size_of::<u16>());
            if !has(VIRTIO_NET_F_CSUM) || end > frame {
                return Err(HeaderError::Checksum {
                    start: header.csum_start,
                    offset: header.csum_offset,
                    frame,
                });
            }
        }
        let ecn = header.gso_type & VIRTIO_NET_HDR_GSO_ECN as u8 != 0;
        let kind = u32::from(header.gso_type) & !VIRTIO_NET_HDR_GSO_ECN;
        let available = match kind {
            VIRTIO_NET_HDR_GSO_NONE => !ecn,
            VIRTIO_NET_HDR_GSO_TCPV4 => has(VIRTIO_NET_F_HOST_TSO4),
            VIRTIO_NET_HDR_GSO_TCPV6 => has(VIRTIO_NET_F_HOST_TSO6),
            _ => false,
        };
        if !available || (ecn && !has(VIRTIO_NET_F_HOST_ECN)) {
            return Err(HeaderError::GsoType(header.gso_type));
        }
        if kind == VIRTIO_NET_HDR_GSO_NONE {
            header.gso_size = 0;
            header.hdr_len = 0;
        } else if !SEGMENTS.contains(&header.gso_size) || header.flags == 0 {
            return Err(HeaderError::Gso);
        }
        if usize::from(header.hdr_len) > frame {
            return Err(HeaderError::HeaderLength {
                headers: header.hdr_len,
                frame,
            });
        }
        Ok(header)
    }

    /// Encodes the header for the tap.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let [hdr_len, gso_size, csum_start, csum_offset] = [
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
        ]
        .map(u16::to_le_bytes);
        [
            self.flags,
            self.gso_type,
            hdr_len[0],
            hdr_len[1],
            gso_size[0],
            gso_size[1],
            csum_start[0],
            csum_start[1],
            csum_offset[0],
            csum_offset[1],
            0,
            0,
        ]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_HOST_TSO6
        | 1 << VIRTIO_NET_F_HOST_ECN;

    proptest! {
        /// Whatever a driver claims, what the host is asked for makes sense for this frame.
        #[test]
        fn no_lie_passes(
            bytes in any::<[u8; HEADER_SIZE]>(),
            gso_type in prop::sample::select(vec![0, 1, 3, 4, 5, 0x81, 0x84]),
            near in any::<bool>(),
            frame in 14_usize..65550,
            features in any::<u64>(),
        ) {
            let mut bytes = bytes;
            bytes[1] = gso_type;
            if near {
                // Small offsets, which have a chance to be right.
                for high in [3, 7, 9] {
                    bytes[high] = 0;
                }
            }
            if let Ok(header) = Header::check(&bytes, frame, features) {
                let has = |feature: u32| features & (1 << feature) != 0;
                let csum = usize::from(header.csum_start) + usize::from(header.csum_offset);
                prop_assert!(header.flags == 0 || (csum + 2 <= frame && has(VIRTIO_NET_F_CSUM)));
                prop_assert!(header.flags <= 1 && usize::from(header.hdr_len) <= frame);
                if header.gso_type == 0 {
                    prop_assert_eq!((header.gso_size, header.hdr_len), (0, 0));
                } else {
                    prop_assert!(SEGMENTS.contains(&header.gso_size) && header.flags == 1);
                    prop_assert!(has(VIRTIO_NET_F_HOST_TSO4) || has(VIRTIO_NET_F_HOST_TSO6));
                }
                let again: [u8; HEADER_SIZE] = header.encode();
                prop_assert_eq!(Header::check(&again, frame, features), Ok(header));
            }
        }
    }

    /// Where a checksum starts and goes, and how long headers are, at all edges of a frame.
    #[test]
    fn nothing_is_outside_of_a_frame_at_each_edge() {
        for frame in [14, 15, 60, 1514, 65535, 65550] {
            let near = [frame - 2, frame - 1, frame, frame + 1].map(|at| at as u16);
            let edges = [
                &[0, 1, 2, 13, 14, 0x7fff, 0x8000, 0xfffe, 0xffff],
                &near[..],
            ]
            .concat();
            for start in &edges {
                for offset in &edges {
                    for headers in &edges {
                        let mut bytes = tcp4();
                        bytes[2..4].copy_from_slice(&headers.to_le_bytes());
                        bytes[6..8].copy_from_slice(&start.to_le_bytes());
                        bytes[8..10].copy_from_slice(&offset.to_le_bytes());
                        let end = u64::from(*start) + u64::from(*offset) + 2;
                        let good = end <= frame as u64 && usize::from(*headers) <= frame;
                        let checked = Header::check(&bytes, frame, ALL);
                        assert_eq!(checked.is_ok(), good, "{bytes:?} in {frame} bytes");
                    }
                }
            }
        }
    }

    /// A TCP segmentation of IPv4, as Linux asks for it.
    fn tcp4() -> [u8; HEADER_SIZE] {
        [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]
    }

    #[test]
    fn good_headers_pass_unchanged() {
        for bytes in [
            [0; HEADER_SIZE],
            [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0],
            tcp4(),
            [1, 0x84, 74, 0, 0x94, 5, 54, 0, 16, 0, 0, 0],
        ] {
            let header = Header::check(&bytes, 3000, ALL).unwrap();
            assert_eq!(header.encode(), bytes);
        }
    }

    #[test]
    fn what_means_nothing_is_cleared() {
        let bytes = [0xfe, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9];
        assert_eq!(
            Header::check(&bytes, 60, ALL).unwrap().encode(),
            [0; HEADER_SIZE]
        );
    }

    #[test]
    fn only_what_was_negotiated_is_done() {
        assert!(Header::check(&tcp4(), 3000, 0).is_err());
        for without in [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4] {
            assert!(Header::check(&tcp4(), 3000, ALL & !(1 << without)).is_err());
        }
        let mut ecn = tcp4();
        ecn[1] |= 0x80;
        assert!(Header::check(&ecn, 3000, ALL).is_ok());
        assert!(Header::check(&ecn, 3000, ALL & !(1 << VIRTIO_NET_F_HOST_ECN)).is_err());
        for kind in [2, 3, 5, 6, 0x7f, 0x80, 0xff] {
            let mut bytes = tcp4();
            bytes[1] = kind;
            assert!(Header::check(&bytes, 3000, ALL).is_err(), "{kind}");
        }
    }

    #[test]
    fn lengths_stay_in_the_frame() {
        assert!(Header::check(&tcp4(), 54, ALL).is_ok());
        assert!(Header::check(&tcp4(), 53, ALL).is_err());
        let mut far = tcp4();
        far[6..10].copy_from_slice(&[0xff; 4]);
        assert!(Header::check(&far, 65550, ALL).is_err());
        for size in [0, 1, 47, u16::MAX] {
            let mut bad_size = tcp4();
            bad_size[4..6].copy_from_slice(&size.to_le_bytes());
            assert_eq!(Header::check(&bad_size, 3000, ALL), Err(HeaderError::Gso));
        }
        let mut smallest = tcp4();
        smallest[4..6].copy_from_slice(&48_u16.to_le_bytes());
        assert!(Header::check(&smallest, 3000, ALL).is_ok());
        let mut no_checksum = tcp4();
        no_checksum[0] = 0;
        assert_eq!(
            Header::check(&no_checksum, 3000, ALL),
            Err(HeaderError::Gso)
        );
    }
}
