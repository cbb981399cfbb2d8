//! Names of files in archives: which are taken, and what they say about layers below.

/// Longest path and link target that Linux takes.
pub(super) const MAX_PATH: usize = 4095;
/// Longest file name that Linux takes.
pub(super) const MAX_NAME: usize = 255;

/// A relative path without empty components, `.` and `..`. A leading `/` is the root of the
/// image; a path that climbs above it is refused, as no honest archive has one.
pub(crate) fn clean_path(path: &[u8]) -> Result<Vec<u8>, &'static str> {
    // Before it is taken apart: an extended header may have a name of a MiB.
    if path.len() > 2 * MAX_PATH {
        return Err("is a path too long");
    }
    if path.contains(&0) {
        return Err("has a zero byte in its name");
    }
    let mut components: Vec<&[u8]> = Vec::new();
    for component in path.split(|b| *b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                components.pop().ok_or("leaves the root of the image")?;
            }
            _ if component.len() > MAX_NAME => return Err("has a file name too long"),
            _ => components.push(component),
        }
    }
    let path = components.join(&b'/');
    if path.len() > MAX_PATH {
        return Err("is a path too long");
    }
    Ok(path)
}

/// What a name says about layers below (OCI image-spec, layer.md, "Whiteouts").
pub(super) enum Whiteout {
    None,
    Of(Vec<u8>),
    Opaque(Vec<u8>),
    /// AUFS's own files, e.g. `.wh..wh.plnk`.
    Bookkeeping,
    Invalid,
}

impl Whiteout {
    pub(super) fn of(path: &[u8]) -> Self {
        let (parent, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&path[..0], path),
        };
        if name == b".wh..wh..opq" {
            return Self::Opaque(parent.to_vec());
        }
        if path
            .split(|b| *b == b'/')
            .any(|name| name.starts_with(b".wh..wh."))
        {
            return Self::Bookkeeping;
        }
        match name.strip_prefix(b".wh.") {
            None => Self::None,
            Some(b"" | b"." | b"..") => Self::Invalid,
            Some(hidden) if parent.is_empty() => Self::Of(hidden.to_vec()),
            Some(hidden) => Self::Of([parent, b"/", hidden].concat()),
        }
    }
}
