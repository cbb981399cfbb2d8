//! The volumes that an image declares.

use std::{collections::BTreeSet, path::PathBuf};

use hull_image::ImageConfig;
use oci_spec::runtime::Spec;

use crate::{error::PodError, field::Field, path::clean};

/// Most volumes of an image; each is a mount in the guest. Images have a few.
const MOST: usize = 256;
/// Longest path, in bytes (`PATH_MAX` of Linux with the zero byte that ends it).
const LONGEST: usize = 4095;

/// Returns where a container gets the volumes that its image declares, parents first. A mount of its
/// specification at the same place or above it takes the place of a volume.
///
/// # Errors
/// [`PodError::InvalidArgument`] when there are too many, or a path can't be one.
pub fn declared_volumes(image: &ImageConfig, spec: &Spec) -> Result<Vec<String>, PodError> {
    let invalid = |reason: String| Err(PodError::invalid(Field::Image, reason));
    if image.volumes.len() > MOST {
        let count = image.volumes.len();
        return invalid(format!("it declares {count} volumes, more than {MOST}"));
    }
    if image.volumes.iter().any(|path| path.contains('\0')) {
        return invalid("it declares a volume with a zero byte in its path".into());
    }
    let mounts: Vec<PathBuf> = spec
        .mounts()
        .iter()
        .flatten()
        .map(|mount| clean(mount.destination()))
        .collect();
    let declared: BTreeSet<PathBuf> = image.volumes.iter().map(clean).collect();
    let mut volumes = Vec::with_capacity(declared.len());
    for path in declared {
        let is_root = path.parent().is_none();
        if is_root || mounts.iter().any(|mount| path.starts_with(mount)) {
            continue;
        }
        match path.into_os_string().into_string() {
            Ok(path) if path.len() <= LONGEST => volumes.push(path),
            _ => return invalid("it declares a volume with a path that is too long".into()),
        }
    }
    Ok(volumes)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Mount;

    use super::*;

    fn volumes(declared: &[&str], mounted: &[&str]) -> Result<Vec<String>, String> {
        let image = ImageConfig {
            volumes: declared.iter().map(|path| (*path).to_owned()).collect(),
            ..ImageConfig::default()
        };
        let mut spec = Spec::default();
        let mounts = mounted.iter().map(|at| {
            let mut mount = Mount::default();
            mount.set_destination(at.into());
            mount
        });
        spec.set_mounts(Some(mounts.collect()));
        declared_volumes(&image, &spec).map_err(|e| e.to_string())
    }

    #[test]
    fn parents_come_first_and_paths_are_from_the_root_on() {
        let found = volumes(&["/b/c/d", "b/c", "/a/../../x/./y//", "/x/y", "/b\n"], &[]);
        assert_eq!(
            found.unwrap(),
            ["/b/c", "/b/c/d", "/b\n", "/x/y"].map(str::to_owned)
        );
    }

    #[test]
    fn a_mount_there_or_above_it_takes_its_place() {
        let declared = [
            "/data",
            "/data2",
            "/logs/app",
            "/proc/x",
            "/deep",
            "/etc/hosts",
        ];
        let mounted = ["/data/", "/logs", "/proc", "/deep/below", "/etc/hosts"];
        assert_eq!(volumes(&declared, &mounted).unwrap(), ["/data2", "/deep"]);
    }

    #[test]
    fn the_root_is_no_volume() {
        assert_eq!(volumes(&["/", "", "..", "/a/.."], &[]).unwrap(), [""; 0]);
    }

    #[test]
    fn what_cannot_be_is_refused_in_one_line() {
        let many: Vec<String> = (0..300).map(|n| format!("/v/{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let refused = volumes(&many, &[]).unwrap_err();
        assert!(
            refused.ends_with("it declares 300 volumes, more than 256"),
            "{refused}"
        );
        let refused = volumes(&["/a\0b"], &[]).unwrap_err();
        assert!(
            refused.ends_with("with a zero byte in its path"),
            "{refused}"
        );
        let refused = volumes(&[&"/long".repeat(900)], &[]).unwrap_err();
        assert!(
            refused.ends_with("with a path that is too long"),
            "{refused}"
        );
    }
}
