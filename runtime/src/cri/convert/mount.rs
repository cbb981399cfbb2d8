//! Mounts, both ways.

use std::path::PathBuf;

use hull_image::ImageId;
use hull_proto_cri::v1;
use hull_spec::spec::{
    IdRange, MountFlag, MountPropagation, MountSource, MountSpec, UserNamespace,
};

use super::{enumeration, image, security};
use crate::cri::error::CriError;

/// A mount that is asked for; `field` is its path in the request.
pub(crate) fn from_cri(field: &str, mount: v1::Mount) -> Result<MountSpec, CriError> {
    if !mount.container_path.starts_with('/') {
        return Err(CriError::invalid(
            format!("{field}.container_path"),
            format!("{:?} is not an absolute path", mount.container_path),
        ));
    }
    let flags = mount.mount_options.iter().map(|option| {
        MountFlag::of_option(option).ok_or_else(|| {
            CriError::unsupported(
                format!("{field}.mount_options"),
                format!("{option:?} is none of nodev, noexec and nosuid"),
            )
        })
    });
    let flags = flags.collect::<Result<_, _>>()?;
    let propagation = match enumeration(&format!("{field}.propagation"), mount.propagation)? {
        v1::MountPropagation::PropagationPrivate => MountPropagation::Private,
        v1::MountPropagation::PropagationHostToContainer => MountPropagation::HostToContainer,
        v1::MountPropagation::PropagationBidirectional => MountPropagation::Bidirectional,
    };
    if mount.recursive_read_only && (!mount.readonly || propagation != MountPropagation::Private) {
        return Err(CriError::invalid(
            format!("{field}.recursive_read_only"),
            "it needs readonly and private propagation",
        ));
    }
    let (uids, gids) = (&mount.uid_mappings, &mount.gid_mappings);
    let owners = if uids.is_empty() && gids.is_empty() {
        None
    } else {
        Some(UserNamespace {
            uids: security::id_range(&format!("{field}.uidMappings"), uids)?,
            gids: security::id_range(&format!("{field}.gidMappings"), gids)?,
        })
    };
    Ok(MountSpec {
        container_path: mount.container_path.into(),
        source: source(field, mount.host_path, mount.image, mount.image_sub_path)?,
        readonly: mount.readonly,
        recursive_readonly: mount.recursive_read_only,
        propagation,
        selinux_relabel: mount.selinux_relabel,
        flags,
        owners,
    })
}

fn source(
    field: &str,
    host_path: String,
    of_image: Option<v1::ImageSpec>,
    sub_path: String,
) -> Result<MountSource, CriError> {
    match of_image.filter(|spec| !spec.image.is_empty()) {
        Some(_) if !host_path.is_empty() => Err(CriError::invalid(
            format!("{field}.image"),
            "it can't be set together with host_path",
        )),
        Some(spec) => Ok(MountSource::Image {
            image: image::request(&format!("{field}.image"), Some(spec))?,
            sub_path,
        }),
        None if !host_path.starts_with('/') => Err(CriError::invalid(
            format!("{field}.host_path"),
            format!("{host_path:?} is not an absolute path"),
        )),
        None => Ok(MountSource::Host(PathBuf::from(host_path))),
    }
}

/// A mount that a container has; `image_id` is the image's, when it is one.
pub(crate) fn to_cri(mount: &MountSpec, image_id: Option<&ImageId>) -> v1::Mount {
    let (host_path, of_image, image_sub_path) = match &mount.source {
        MountSource::Host(path) => (path.to_string_lossy().into_owned(), None, String::new()),
        MountSource::Image { image, sub_path } => {
            let image = v1::ImageSpec {
                image_ref: image_id.map(ToString::to_string).unwrap_or_default(),
                ..image::spec(image)
            };
            (String::new(), Some(image), sub_path.clone())
        }
    };
    let propagation = match mount.propagation {
        MountPropagation::Private => v1::MountPropagation::PropagationPrivate,
        MountPropagation::HostToContainer => v1::MountPropagation::PropagationHostToContainer,
        MountPropagation::Bidirectional => v1::MountPropagation::PropagationBidirectional,
    };
    v1::Mount {
        container_path: mount.container_path.to_string_lossy().into_owned(),
        host_path,
        readonly: mount.readonly,
        selinux_relabel: mount.selinux_relabel,
        propagation: propagation.into(),
        recursive_read_only: mount.recursive_readonly,
        image: of_image,
        image_sub_path,
        uid_mappings: mappings(mount.owners.map(|owners| owners.uids)),
        gid_mappings: mappings(mount.owners.map(|owners| owners.gids)),
        mount_options: mount
            .flags
            .iter()
            .map(|flag| flag.option().to_owned())
            .collect(),
    }
}

fn mappings(range: Option<IdRange>) -> Vec<v1::IdMapping> {
    range.map_or_else(Vec::new, security::id_mappings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> v1::Mount {
        v1::Mount {
            container_path: "/in".into(),
            host_path: "/out".into(),
            ..Default::default()
        }
    }

    fn mapping(container_id: u32) -> v1::IdMapping {
        v1::IdMapping {
            host_id: 100_000,
            container_id,
            length: 65_536,
        }
    }

    #[test]
    fn mounts_come_back_as_they_were_sent() {
        let read_only = v1::Mount {
            readonly: true,
            recursive_read_only: true,
            ..host()
        };
        let of_image = v1::Mount {
            container_path: "/in".into(),
            image: Some(v1::ImageSpec {
                image: "busybox".into(),
                ..Default::default()
            }),
            image_sub_path: "etc".into(),
            propagation: v1::MountPropagation::PropagationHostToContainer.into(),
            ..Default::default()
        };
        let mapped = v1::Mount {
            uid_mappings: vec![mapping(0)],
            gid_mappings: vec![mapping(0)],
            ..host()
        };
        let limited = v1::Mount {
            mount_options: ["noexec", "nodev", "nosuid"].map(str::to_owned).to_vec(),
            ..host()
        };
        for sent in [host(), read_only, of_image, mapped, limited] {
            assert_eq!(to_cri(&from_cri("m", sent.clone()).unwrap(), None), sent);
        }
    }

    #[test]
    fn malformed_mounts_are_refused_by_field() {
        let cases: [(v1::Mount, &str); 8] = [
            (
                v1::Mount {
                    container_path: "in".into(),
                    ..host()
                },
                "m.container_path",
            ),
            (
                v1::Mount {
                    host_path: String::new(),
                    ..host()
                },
                "m.host_path",
            ),
            (
                v1::Mount {
                    propagation: 7,
                    ..host()
                },
                "m.propagation",
            ),
            (
                v1::Mount {
                    recursive_read_only: true,
                    ..host()
                },
                "m.recursive_read_only",
            ),
            (
                v1::Mount {
                    mount_options: vec!["noexec".into(), "suid".into()],
                    ..host()
                },
                "m.mount_options",
            ),
            (
                v1::Mount {
                    image: Some(v1::ImageSpec {
                        image: "busybox".into(),
                        ..Default::default()
                    }),
                    ..host()
                },
                "m.image",
            ),
            (
                v1::Mount {
                    uid_mappings: vec![mapping(0)],
                    ..host()
                },
                "m.gidMappings",
            ),
            (
                v1::Mount {
                    uid_mappings: vec![mapping(1)],
                    gid_mappings: vec![mapping(0)],
                    ..host()
                },
                "m.uidMappings[0].container_id",
            ),
        ];
        for (mount, field) in cases {
            let error = from_cri("m", mount).unwrap_err();
            assert!(error.to_string().starts_with(field), "{error}");
        }
    }
}
