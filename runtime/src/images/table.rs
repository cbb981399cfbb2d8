//! Lists of images, for people and for programs.

use hull_proto_images::v1::Image;
use serde_json::{Value, json};

use crate::table::{self, Column};

/// Which names an image is listed under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Names {
    /// Those with a tag, or else those with a digest.
    Tags,
    /// Those with a digest, or else those with a tag.
    Digests,
}

/// One line per name.
pub(super) fn text(images: &[Image], names: Names) -> String {
    let columns = [
        Column::Left("NAME"),
        Column::Left("ID"),
        Column::Right("SIZE"),
        Column::Right("CONTAINERS"),
    ];
    let mut rows = Vec::new();
    for image in images {
        let preferred = match names {
            Names::Tags => [&image.tags, &image.digests],
            Names::Digests => [&image.digests, &image.tags],
        };
        let none = if image.removed { "(removed)" } else { "-" };
        let unnamed = vec![none.to_owned()];
        let listed = preferred.into_iter().find(|names| !names.is_empty());
        for name in listed.unwrap_or(&unnamed) {
            rows.push([
                name.clone(),
                table::short(&image.id),
                table::size(image.bytes),
                image.containers.to_string(),
            ]);
        }
    }
    table::text(columns, &rows)
}

/// All of an image.
pub(super) fn json(image: &Image) -> Value {
    json!({
        "id": image.id, "tags": image.tags, "digests": image.digests,
        "bytes": image.bytes, "pinned": image.pinned, "containers": image.containers,
        "removed": image.removed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_line_and_an_image_without_one_too() {
        let image = |id: &str, tags: &[&str], digests: &[&str]| Image {
            id: format!("sha256:{}", id.repeat(64)),
            tags: tags.iter().map(ToString::to_string).collect(),
            digests: digests.iter().map(ToString::to_string).collect(),
            bytes: 2048,
            pinned: false,
            containers: 3,
            removed: false,
        };
        let images = [
            image("a", &["x/y:1", "x/y:2"], &["x/y@sha256:1"]),
            image("b", &[], &["x/z@sha256:2"]),
            image("c", &[], &[]),
            Image {
                removed: true,
                ..image("d", &[], &[])
            },
        ];
        let words = |names| -> Vec<String> {
            let text = text(&images, names);
            text.lines()
                .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
                .collect()
        };
        let rest = |id: &str| format!("{} 2.0 KiB 3", id.repeat(12));
        let (a, b, c, d) = (rest("a"), rest("b"), rest("c"), rest("d"));
        let mut expected = vec![
            "NAME ID SIZE CONTAINERS".to_owned(),
            format!("x/y:1 {a}"),
            format!("x/y:2 {a}"),
            format!("x/z@sha256:2 {b}"),
            format!("- {c}"),
            format!("(removed) {d}"),
        ];
        assert_eq!(words(Names::Tags), expected);
        expected.splice(1..3, [format!("x/y@sha256:1 {a}")]);
        assert_eq!(words(Names::Digests), expected);
        assert_eq!(json(&images[0])["tags"][1], "x/y:2");
    }
}
