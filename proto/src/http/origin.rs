//! Which origins may open a WebSocket (RFC 6455 section 10.2).

/// The origins that are allowed besides the server's own.
///
/// A pattern is a whole origin (`https://app.example.com`) in which `*` stands for any characters:
/// `https://*.example.com`, `http://localhost:*`, or `*` alone for all. Letter case does not matter.
#[derive(Clone, Debug, Default)]
pub struct AllowedOrigins {
    patterns: Vec<String>,
}

impl AllowedOrigins {
    /// Takes the patterns of a configuration.
    pub fn new<P: AsRef<str>>(patterns: impl IntoIterator<Item = P>) -> Self {
        Self { patterns: patterns.into_iter().map(|pattern| pattern.as_ref().to_ascii_lowercase()).collect() }
    }

    /// Whether a request may be upgraded: `origin` is the value of its Origin field, `host` that of
    /// its Host field.
    ///
    /// Without an Origin the client is no browser, and what a page may do is not the question:
    /// allowed. An origin whose host and port are those of the request is the server's own: allowed.
    /// Any other has to match a pattern; with no patterns none does.
    pub fn allows(&self, origin: Option<&str>, host: Option<&str>) -> bool {
        let Some(origin) = origin else {
            return true;
        };
        let authority = origin.split_once("://").map(|(_, authority)| authority);
        if let (Some(authority), Some(host)) = (authority, host)
            && authority.eq_ignore_ascii_case(host)
        {
            return true;
        }
        let origin = origin.to_ascii_lowercase();
        self.patterns.iter().any(|pattern| matches(pattern.as_bytes(), origin.as_bytes()))
    }
}

/// Whether `text` matches `pattern`: of the stars only the last one seen has to be tried again, so the
/// time is at most the product of the lengths, and the text's is that of a request head.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            retry = Some((p + 1, t));
            p += 1;
        } else if pattern.get(p) == Some(&text[t]) {
            p += 1;
            t += 1;
        } else if let Some((after_star, from)) = retry {
            (p, t) = (after_star, from + 1);
            retry = Some((after_star, from + 1));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(patterns: &[&str], origin: Option<&str>, host: Option<&str>, expected: bool) {
        let allowed = AllowedOrigins::new(patterns);
        assert_eq!(allowed.allows(origin, host), expected, "{origin:?} at {host:?} with {patterns:?}");
    }

    #[test]
    fn origins() {
        let host = Some("chat.example.com:8000");
        check(&[], None, host, true);
        check(&["https://a.example"], None, None, true);
        check(&[], Some("http://chat.example.com:8000"), host, true);
        check(&[], Some("https://CHAT.example.com:8000"), host, true);
        check(&[], Some("http://chat.example.com"), host, false);
        check(&[], Some("http://chat.example.com:8000.evil.example"), host, false);
        check(&[], Some("null"), Some("null"), false);
        check(&[], Some("http://x"), None, false);
        check(&[], Some(""), Some(""), false);
        check(&["*"], Some("null"), host, true);
        check(&["*"], Some(""), host, true);
        check(&["https://App.example"], Some("https://app.EXAMPLE"), host, true);
        check(&["https://app.example"], Some("http://app.example"), host, false);
        check(&["https://app.example"], Some("https://app.example.evil"), host, false);
    }

    #[test]
    fn stars() {
        let host = Some("h");
        for (pattern, origin, expected) in [
            ("https://*.example.com", "https://a.b.example.com", true),
            ("https://*.example.com", "https://example.com", false),
            ("https://*.example.com", "https://a.example.com.evil", false),
            ("http://localhost:*", "http://localhost:3000", true),
            ("http://localhost:*", "http://localhost", false),
            ("*://a*b*c", "x://aXbYbZc", true),
            ("*://a*b*c", "x://aXbYbZcd", false),
            ("https://a**", "https://a", true),
            ("", "https://a", false),
        ] {
            check(&[pattern], Some(origin), host, expected);
        }
    }
}
