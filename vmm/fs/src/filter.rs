//! Which FUSE requests the file system gets at all. The rest of a request is checked by those who
//! decode it; here is what a passthrough to a host must refuse whoever decodes it.

use fuse_backend_rs::abi::fuse_abi::Opcode;
use hull_proto_vmm::fs::MAX_DATA;

use crate::packet::{IN_HEADER, word};
use crate::session::NOBODY;

/// The largest value of an extended attribute (XATTR_SIZE_MAX).
const MAX_XATTR: u32 = 64 << 10;
/// The prefix of the names of ACLs among extended attributes, with the end of the fields that precede
/// a name in a request.
const ACL: &[u8] = b"\0\0\0\0system.posix_acl_";
/// Flags of open(2) that a guest may have: no O_DIRECT, whose alignment the server can't keep, no
/// O_PATH, no O_TMPFILE, no signals.
const OPEN_FLAGS: u32 = (libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_CREAT
    | libc::O_DIRECTORY
    | libc::O_DSYNC
    | libc::O_EXCL
    | libc::O_NOATIME
    | libc::O_NOFOLLOW
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_TRUNC) as u32;

/// The requests that are handled. Not ioctl and poll on the host's files; not locks, which the guest's
/// kernel then has itself.
const HANDLED: [Opcode; 37] = [
    Opcode::Lookup,
    Opcode::Forget,
    Opcode::Getattr,
    Opcode::Setattr,
    Opcode::Readlink,
    Opcode::Symlink,
    Opcode::Mknod,
    Opcode::Mkdir,
    Opcode::Unlink,
    Opcode::Rmdir,
    Opcode::Rename,
    Opcode::Link,
    Opcode::Open,
    Opcode::Read,
    Opcode::Write,
    Opcode::Statfs,
    Opcode::Release,
    Opcode::Fsync,
    Opcode::Setxattr,
    Opcode::Getxattr,
    Opcode::Listxattr,
    Opcode::Removexattr,
    Opcode::Flush,
    Opcode::Init,
    Opcode::Opendir,
    Opcode::Readdir,
    Opcode::Releasedir,
    Opcode::Fsyncdir,
    Opcode::Access,
    Opcode::Create,
    Opcode::Interrupt,
    Opcode::Destroy,
    Opcode::BatchForget,
    Opcode::Fallocate,
    Opcode::Readdirplus,
    Opcode::Rename2,
    Opcode::Lseek,
];

/// How a request is handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The file system handles it.
    Pass,
    /// As [`Verdict::Pass`]; a session begins.
    Begin,
    /// As [`Verdict::Pass`], without the power to leave a file of another user's to be run as that
    /// user.
    Lower,
    /// [`crate::files::Files::seek`] handles it.
    Seek,
    /// As [`Verdict::Pass`]; it asks for an ACL, see [`report_no_acl`].
    Acl,
    /// The request is answered with this error number.
    Refuse(i32),
    /// The request is neither handled nor answered.
    Drop,
}

/// Judges a packet, and takes flags out of it that a guest may not have.
pub fn judge(packet: &mut [u8]) -> Verdict {
    let (Some(length), Some(opcode)) = (word(packet, 0), word(packet, 4)) else {
        return Verdict::Drop;
    };
    if packet.len() < IN_HEADER || length as usize != packet.len() {
        return Verdict::Drop;
    }
    let Some(opcode) = HANDLED
        .into_iter()
        .find(|handled| *handled as u32 == opcode)
    else {
        return Verdict::Refuse(libc::ENOSYS);
    };
    match opcode {
        Opcode::Init => Verdict::Begin,
        // The owner of a new file can't be left out.
        Opcode::Create | Opcode::Mkdir | Opcode::Mknod | Opcode::Symlink if is_nobodys(packet) => {
            Verdict::Refuse(libc::EOVERFLOW)
        }
        Opcode::Lookup => name(&packet[IN_HEADER..]),
        Opcode::Mknod => node(packet),
        // The flags are the first word.
        Opcode::Open | Opcode::Opendir | Opcode::Create => restrict_flags(packet, IN_HEADER),
        Opcode::Read | Opcode::Readdir | Opcode::Readdirplus | Opcode::Write => {
            match word(packet, IN_HEADER + 16) {
                Some(size) if size as usize <= MAX_DATA => restrict_flags(packet, IN_HEADER + 32),
                _ => Verdict::Refuse(libc::EINVAL),
            }
        }
        Opcode::Getxattr | Opcode::Listxattr => match word(packet, IN_HEADER) {
            Some(size) if size > MAX_XATTR => Verdict::Refuse(libc::E2BIG),
            Some(_) if packet[IN_HEADER + 4..].starts_with(ACL) => Verdict::Acl,
            Some(_) => Verdict::Pass,
            None => Verdict::Refuse(libc::E2BIG),
        },
        Opcode::Rename2 => rename(packet),
        // Root's, if the guest says so; it need not say whose a request is.
        Opcode::Fallocate if word(packet, 24) != Some(0) => Verdict::Lower,
        Opcode::Lseek => Verdict::Seek,
        // A request that has begun is finished.
        Opcode::Interrupt => Verdict::Drop,
        _ => Verdict::Pass,
    }
}

/// Whether a request is answered.
#[must_use]
pub fn is_answered(packet: &[u8]) -> bool {
    let silent = [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt];
    word(packet, 4).is_some_and(|opcode| silent.into_iter().all(|s| s as u32 != opcode))
}

/// The mask of a request that makes a file, which is taken out of it: with the mask as its own, the
/// server's thread has the host's kernel apply it, or what a default ACL says in its place.
pub fn take_mask(packet: &mut [u8]) -> Option<u32> {
    let opcode = word(packet, 4)?;
    let offset = match opcode {
        _ if opcode == Opcode::Create as u32 => IN_HEADER + 8,
        _ if opcode == Opcode::Mkdir as u32 => IN_HEADER + 4,
        _ if opcode == Opcode::Mknod as u32 => IN_HEADER + 8,
        _ => return None,
    };
    let mask = word(packet, offset)?;
    packet[offset..offset + 4].fill(0);
    Some(mask)
}

/// Makes of the answer that a file system of the host has no ACLs the answer that a file has none: the
/// guest's kernel takes each other error for a reason to let nobody in.
pub fn report_no_acl(answer: &mut [u8]) {
    let none = [libc::EOPNOTSUPP, libc::ENOSYS, libc::EINVAL].map(|errno| -errno);
    let error = word(answer, 4).map(u32::cast_signed);
    if error.is_some_and(|error| none.contains(&error)) {
        answer[4..8].copy_from_slice(&(-libc::ENODATA).to_le_bytes());
    }
}

/// `..` would lead out of a directory that the host moved elsewhere; a client that walks paths
/// itself has no use for it.
fn name(bytes: &[u8]) -> Verdict {
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    if matches!(name, b"" | b"." | b"..") || name.contains(&b'/') {
        Verdict::Refuse(libc::EINVAL)
    } else {
        Verdict::Pass
    }
}

fn node(packet: &[u8]) -> Verdict {
    let kind = word(packet, IN_HEADER).map(|mode| mode & libc::S_IFMT);
    match kind {
        // Linux names the kind of a regular file, too.
        Some(libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK) => Verdict::Pass,
        _ => Verdict::Refuse(libc::EPERM),
    }
}

/// A whiteout is a device node, which needs no power to be made; of the flags, it alone makes one.
fn rename(packet: &[u8]) -> Verdict {
    let whiteout = libc::RENAME_WHITEOUT;
    match word(packet, IN_HEADER + 8) {
        Some(flags) if flags & whiteout == 0 => Verdict::Pass,
        _ => Verdict::Refuse(libc::EINVAL),
    }
}

/// Whether a request leaves out its user or its group.
fn is_nobodys(packet: &[u8]) -> bool {
    [24, 28]
        .into_iter()
        .any(|at| word(packet, at) == Some(NOBODY))
}

fn restrict_flags(packet: &mut [u8], offset: usize) -> Verdict {
    let Some(flags) = word(packet, offset) else {
        return Verdict::Refuse(libc::EINVAL);
    };
    packet[offset..offset + 4].copy_from_slice(&(flags & OPEN_FLAGS).to_le_bytes());
    Verdict::Pass
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::refusal;

    fn packet(opcode: Opcode, body: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; IN_HEADER];
        packet[..4].copy_from_slice(&((IN_HEADER + body.len()) as u32).to_le_bytes());
        packet[4..8].copy_from_slice(&(opcode as u32).to_le_bytes());
        packet[8] = 7;
        packet.extend_from_slice(body);
        packet
    }

    fn verdict(opcode: Opcode, body: &[u8]) -> Verdict {
        judge(&mut packet(opcode, body))
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in [&b"..\0"[..], b".\0", b"a/b\0", b"/\0", b"\0", b"", b".."] {
            assert_eq!(
                verdict(Opcode::Lookup, name),
                Verdict::Refuse(libc::EINVAL),
                "{name:?}"
            );
        }
        for name in [&b"...\0"[..], b"..data\0", b"a\0"] {
            assert_eq!(verdict(Opcode::Lookup, name), Verdict::Pass);
        }
    }

    #[test]
    fn device_nodes_are_refused() {
        for (kind, expected) in [
            (libc::S_IFCHR, Verdict::Refuse(libc::EPERM)),
            (libc::S_IFBLK, Verdict::Refuse(libc::EPERM)),
            (0, Verdict::Refuse(libc::EPERM)),
            (libc::S_IFREG, Verdict::Pass),
            (libc::S_IFIFO, Verdict::Pass),
        ] {
            let mut body = (kind | 0o644).to_le_bytes().to_vec();
            body.extend_from_slice(&[0; 12]);
            assert_eq!(verdict(Opcode::Mknod, &body), expected);
        }
    }

    #[test]
    fn new_files_belong_to_somebody() {
        for (at, id) in [(24, NOBODY), (28, NOBODY), (24, 7)] {
            let refused = id == NOBODY;
            let judged = |opcode| {
                let mut packet = packet(opcode, &[0; 32]);
                packet[at..at + 4].copy_from_slice(&id.to_le_bytes());
                judge(&mut packet)
            };
            for opcode in [
                Opcode::Create,
                Opcode::Mkdir,
                Opcode::Mknod,
                Opcode::Symlink,
            ] {
                let overflow = Verdict::Refuse(libc::EOVERFLOW);
                assert_eq!(judged(opcode) == overflow, refused, "{opcode:?} {at} {id}");
            }
            for opcode in [Opcode::Setattr, Opcode::Unlink, Opcode::Link] {
                assert_eq!(judged(opcode), Verdict::Pass, "{opcode:?}");
            }
        }
    }

    #[test]
    fn flags_that_a_guest_may_not_have_are_taken_away() {
        let flags = (libc::O_RDWR | libc::O_DIRECT | libc::O_PATH | libc::O_TMPFILE) as u32;
        let mut open = packet(Opcode::Open, &[flags.to_le_bytes(), [0; 4]].concat());
        assert_eq!(judge(&mut open), Verdict::Pass);
        let left = (libc::O_RDWR | libc::O_DIRECTORY) as u32;
        assert_eq!(word(&open, IN_HEADER), Some(left));
        let mut read = [0; 40];
        read[32..36].copy_from_slice(&(libc::O_ASYNC as u32).to_le_bytes());
        let mut read = packet(Opcode::Read, &read);
        assert_eq!(judge(&mut read), Verdict::Pass);
        assert_eq!(word(&read, IN_HEADER + 32), Some(0));
    }

    #[test]
    fn renames_that_make_device_nodes_are_refused() {
        for (flags, expected) in [
            (0, Verdict::Pass),
            (libc::RENAME_NOREPLACE, Verdict::Pass),
            (libc::RENAME_EXCHANGE, Verdict::Pass),
            (libc::RENAME_WHITEOUT, Verdict::Refuse(libc::EINVAL)),
            (u32::MAX, Verdict::Refuse(libc::EINVAL)),
        ] {
            let body = [[0; 8], u64::from(flags).to_le_bytes()].concat();
            assert_eq!(verdict(Opcode::Rename2, &body), expected, "{flags:x}");
        }
        assert_eq!(
            verdict(Opcode::Rename2, &[0; 8]),
            Verdict::Refuse(libc::EINVAL)
        );
    }

    #[test]
    fn roots_alone_keep_the_set_id_bits() {
        for (uid, expected) in [
            (0, Verdict::Pass),
            (1000, Verdict::Lower),
            (NOBODY, Verdict::Lower),
        ] {
            let mut packet = packet(Opcode::Fallocate, &[0; 32]);
            packet[24..28].copy_from_slice(&u32::to_le_bytes(uid));
            assert_eq!(judge(&mut packet), expected, "{uid}");
        }
    }

    #[test]
    fn masks_are_taken_from_requests_that_have_one() {
        let body = [1_u32, 0o22, 0o27, 4].map(u32::to_le_bytes).concat();
        for (opcode, mask, at) in [
            (Opcode::Create, 0o27, 8),
            (Opcode::Mknod, 0o27, 8),
            (Opcode::Mkdir, 0o22, 4),
        ] {
            let mut packet = packet(opcode, &body);
            assert_eq!(take_mask(&mut packet), Some(mask), "{opcode:?}");
            let mut left = body.clone();
            left[at..at + 4].fill(0);
            assert_eq!(packet[IN_HEADER..], left);
        }
        for mut packet in [
            packet(Opcode::Symlink, &body),
            packet(Opcode::Mkdir, &body[..7]),
            vec![],
        ] {
            let before = packet.clone();
            assert_eq!(take_mask(&mut packet), None);
            assert_eq!(packet, before);
        }
    }

    #[test]
    fn a_file_system_without_acls_has_files_without_them() {
        for (name, expected) in [
            ("system.posix_acl_access", Verdict::Acl),
            ("system.posix_acl_default", Verdict::Acl),
            ("user.system.posix_acl_access", Verdict::Pass),
            ("user.a", Verdict::Pass),
        ] {
            let body = [&[0; 8], name.as_bytes(), &[0]].concat();
            assert_eq!(verdict(Opcode::Getxattr, &body), expected, "{name}");
        }
        for (error, expected) in [
            (libc::EOPNOTSUPP, libc::ENODATA),
            (libc::EINVAL, libc::ENODATA),
            (libc::EIO, libc::EIO),
            (libc::ERANGE, libc::ERANGE),
            (0, 0),
        ] {
            let mut answer = refusal(&[], error);
            report_no_acl(&mut answer);
            assert_eq!(answer, refusal(&[], expected));
        }
        report_no_acl(&mut []);
    }

    #[test]
    fn sizes_are_bounded() {
        let mut read = [0; 40];
        read[16..20].copy_from_slice(&(MAX_DATA as u32 + 1).to_le_bytes());
        for opcode in [Opcode::Read, Opcode::Readdirplus, Opcode::Write] {
            assert_eq!(verdict(opcode, &read), Verdict::Refuse(libc::EINVAL));
        }
        let xattr = [0xff; 8];
        assert_eq!(
            verdict(Opcode::Getxattr, &xattr),
            Verdict::Refuse(libc::E2BIG)
        );
    }

    #[test]
    fn what_is_no_request_is_dropped_and_what_is_unknown_refused() {
        assert_eq!(judge(&mut []), Verdict::Drop);
        let mut short = packet(Opcode::Getattr, &[]);
        short.pop();
        assert_eq!(judge(&mut short), Verdict::Drop);
        for opcode in [Opcode::Ioctl, Opcode::Setlkw, Opcode::Poll] {
            assert_eq!(verdict(opcode, &[0; 64]), Verdict::Refuse(libc::ENOSYS));
        }
        let mut unknown = packet(Opcode::Getattr, &[]);
        for opcode in [0_u32, 7, 19, 50, u32::MAX] {
            unknown[4..8].copy_from_slice(&opcode.to_le_bytes());
            assert_eq!(judge(&mut unknown), Verdict::Refuse(libc::ENOSYS));
        }
        assert!(is_answered(&unknown));
        assert!(!is_answered(&packet(Opcode::BatchForget, &[])));
    }
}
