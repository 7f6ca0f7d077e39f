//! The demo page, part of the binary.
//!
//! Owns which files of `node/demo/` are served under which path. Everything that the page asks for is
//! here, so that it works without a network.

use std::sync::Arc;

use crate::core::Asset;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

macro_rules! page {
    ($path:literal, $content_type:expr, $file:literal) => {
        Asset {
            path: $path,
            content_type: $content_type,
            body: include_bytes!(concat!("../../../demo/", $file)),
        }
    };
}

/// The pages that the node serves on its traffic port: the demo's, or none.
pub(super) fn assets(demo: bool) -> Arc<[Asset]> {
    if !demo {
        return Arc::from([]);
    }
    Arc::from([
        page!("/", HTML, "index.html"),
        page!("/style.css", CSS, "style.css"),
        page!("/main.js", SCRIPT, "main.js"),
        page!("/connection.js", SCRIPT, "connection.js"),
        page!("/room.js", SCRIPT, "room.js"),
        page!("/view.js", SCRIPT, "view.js"),
        page!("/favicon.svg", SVG, "favicon.svg"),
        // Asked for by browsers that do not look at the page's own icon.
        page!("/favicon.ico", SVG, "favicon.svg"),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every path in quotes that the served files name.
    fn named(body: &str) -> Vec<&str> {
        let quoted = body.split(['"', '\'', '`']).filter(|text| text.starts_with('/'));
        quoted
            .filter(|text| text.ends_with(".js") || text.ends_with(".css") || text.ends_with(".svg"))
            .collect()
    }

    #[test]
    fn the_page_finds_all_that_it_names_on_the_node_itself() {
        let assets = assets(true);
        let mut seen = 0;
        for asset in assets.iter() {
            let body = std::str::from_utf8(asset.body).expect("text");
            assert!(!body.contains("https://"), "{} names another server", asset.path);
            for path in named(body) {
                seen += 1;
                assert!(assets.iter().any(|asset| asset.path == path), "{} names {path}", asset.path);
            }
        }
        assert!(seen >= 6, "the page names its style sheet, its scripts and its icon");
    }

    #[test]
    fn without_the_demo_there_is_no_page() {
        assert!(super::assets(false).is_empty());
    }
}
