//! Lists of images, for people and for programs.

use std::fmt::Write;

use hull_proto_images::v1::Image;
use serde_json::json;

/// Digits of an id that people are shown; enough to ask by.
const SHORT_ID: usize = 12;

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
    let mut rows = vec![["NAME", "ID", "SIZE", "CONTAINERS"].map(str::to_owned)];
    for image in images {
        let preferred = match names {
            Names::Tags => [&image.tags, &image.digests],
            Names::Digests => [&image.digests, &image.tags],
        };
        let none = if image.removed { "(removed)" } else { "-" };
        let unnamed = vec![none.to_owned()];
        let listed = preferred.into_iter().find(|names| !names.is_empty());
        for name in listed.unwrap_or(&unnamed) {
            let digits = image.id.trim_start_matches("sha256:");
            let short = digits.get(..SHORT_ID).unwrap_or(digits);
            let containers = image.containers.to_string();
            rows.push([
                name.clone(),
                short.to_owned(),
                size(image.bytes),
                containers,
            ]);
        }
    }
    let width = rows.iter().map(|row| row[0].len()).max().unwrap_or(0);
    let mut text = String::new();
    for [name, id, size, containers] in rows {
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{name:width$}  {id:SHORT_ID$}  {size:>10}  {containers:>10}"
        );
    }
    text
}

/// All of it, as one array.
pub(super) fn json(images: &[Image]) -> String {
    let images: Vec<_> = images
        .iter()
        .map(|image| {
            json!({
                "id": image.id, "tags": image.tags, "digests": image.digests,
                "bytes": image.bytes, "pinned": image.pinned, "containers": image.containers,
                "removed": image.removed,
            })
        })
        .collect();
    format!("{}\n", serde_json::Value::from(images))
}

/// Bytes in a unit that suits them.
pub(super) fn size(bytes: u64) -> String {
    let mut value = bytes;
    let mut tenths = 0;
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024 {
            break;
        }
        tenths = value % 1024 * 10 / 1024;
        value /= 1024;
        unit = larger;
    }
    if unit == "B" {
        format!("{value} B")
    } else {
        format!("{value}.{tenths} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_unit_that_suits_them() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (5 << 20, "5.0 MiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
    }

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
        let rest = |id: &str| format!("{} 2.0 KiB 3", id.repeat(SHORT_ID));
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
        let json: serde_json::Value = serde_json::from_str(&json(&images)).unwrap();
        assert_eq!(json[0]["tags"][1], "x/y:2");
    }
}
