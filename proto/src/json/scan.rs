//! The cursor over a document, and the conversions.

use std::borrow::Cow;

use super::JsonError;
use super::skip::{self, string_run};
use crate::limits::JSON_DEPTH_MAX;

/// A position in a JSON document. Every method starts at the next value (or structure byte) and
/// leaves the position after it; after an error the position means nothing.
#[derive(Clone, Debug)]
pub struct Scanner<'a> {
    text: &'a str,
    position: usize,
    depth: u32,
}

impl<'a> Scanner<'a> {
    /// At the start of `text`.
    pub fn new(text: &'a str) -> Self {
        Self { text, position: 0, depth: 0 }
    }

    /// The document is over: nothing but whitespace follows.
    pub fn end(&mut self) -> Result<(), JsonError> {
        self.skip_whitespace();
        if self.position == self.text.len() { Ok(()) } else { Err(JsonError::Syntax) }
    }

    /// An object: `field` is called for every key and must consume the value. Keys come as they
    /// stand, also repeatedly.
    #[inline]
    pub fn object<E: From<JsonError>>(
        &mut self,
        mut field: impl FnMut(&mut Self, &str) -> Result<(), E>,
    ) -> Result<(), E> {
        self.open()?;
        if self.take(b'}') {
            self.depth -= 1;
            return Ok(());
        }
        loop {
            let unescaped;
            let key = match self.plain_string() {
                Some(key) => key,
                None => {
                    unescaped = self.string_escaped()?;
                    &unescaped
                }
            };
            self.skip_whitespace();
            self.expect(b':')?;
            field(self, key)?;
            self.skip_whitespace();
            if self.take(b',') {
                self.skip_whitespace();
                continue;
            }
            self.expect(b'}')?;
            self.depth -= 1;
            return Ok(());
        }
    }

    /// An object whose keys are data: like [`object`](Self::object), but a key may be kept.
    pub fn map<E: From<JsonError>>(
        &mut self,
        mut entry: impl FnMut(&mut Self, Cow<'a, str>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.open()?;
        if self.take(b'}') {
            self.depth -= 1;
            return Ok(());
        }
        loop {
            let key = match self.plain_string() {
                Some(key) => Cow::Borrowed(key),
                None => Cow::Owned(self.string_escaped()?),
            };
            self.skip_whitespace();
            self.expect(b':')?;
            entry(self, key)?;
            self.skip_whitespace();
            if !self.take(b',') {
                break;
            }
            self.skip_whitespace();
        }
        self.expect(b'}')?;
        self.depth -= 1;
        Ok(())
    }

    /// A `null`, if that is what comes next; otherwise nothing is consumed.
    #[inline]
    pub fn null(&mut self) -> Result<bool, JsonError> {
        self.skip_whitespace();
        if self.peek() != Some(b'n') {
            return Ok(false);
        }
        self.literal("null")?;
        Ok(true)
    }

    /// A string; `null` is the empty one. Borrowed unless it carries escapes.
    #[inline]
    pub fn string(&mut self) -> Result<Cow<'a, str>, JsonError> {
        self.skip_whitespace();
        match self.plain_string() {
            Some(text) => Ok(Cow::Borrowed(text)),
            None if self.peek() == Some(b'"') => self.string_escaped().map(Cow::Owned),
            None => self.absent(Cow::Borrowed("")),
        }
    }

    /// A boolean; `null` is `false`.
    pub fn boolean(&mut self) -> Result<bool, JsonError> {
        self.skip_whitespace();
        match self.peek() {
            Some(b't') => self.literal("true").map(|()| true),
            Some(b'f') => self.literal("false").map(|()| false),
            _ => self.absent(false),
        }
    }

    /// An unsigned integer that fits 32 bits; `null` is 0.
    pub fn u32(&mut self) -> Result<u32, JsonError> {
        u32::try_from(self.u64()?).map_err(|_| JsonError::Type)
    }

    /// An unsigned integer that fits 64 bits; `null` is 0.
    pub fn u64(&mut self) -> Result<u64, JsonError> {
        self.skip_whitespace();
        match self.peek() {
            Some(b'0'..=b'9') => self.digits(),
            _ => self.absent(0),
        }
    }

    /// An integer that fits 32 bits; `null` is 0.
    pub fn i32(&mut self) -> Result<i32, JsonError> {
        i32::try_from(self.i64()?).map_err(|_| JsonError::Type)
    }

    /// An integer that fits 64 bits; `null` is 0.
    pub fn i64(&mut self) -> Result<i64, JsonError> {
        self.skip_whitespace();
        if self.take(b'-') {
            if !matches!(self.peek(), Some(b'0'..=b'9')) {
                return Err(JsonError::Syntax);
            }
            return 0i64.checked_sub_unsigned(self.digits()?).ok_or(JsonError::Type);
        }
        i64::try_from(self.u64()?).map_err(|_| JsonError::Type)
    }

    /// Any value, validated, as it stands: no whitespace around it. `null` is a value here.
    #[inline]
    pub fn raw(&mut self) -> Result<&'a str, JsonError> {
        self.skip_whitespace();
        let start = self.position;
        self.position = skip::value(self.text.as_bytes(), start, self.depth)?;
        self.text.get(start..self.position).ok_or(JsonError::Syntax)
    }

    /// Any value, validated and dropped.
    pub fn skip(&mut self) -> Result<(), JsonError> {
        self.skip_whitespace();
        self.position = skip::value(self.text.as_bytes(), self.position, self.depth)?;
        Ok(())
    }

    /// `null` gives `value`; anything else here is a value of another type.
    fn absent<T>(&mut self, value: T) -> Result<T, JsonError> {
        if self.null()? {
            return Ok(value);
        }
        self.skip()?;
        Err(JsonError::Type)
    }

    /// The opening brace of an object, and the whitespace after it.
    #[inline]
    fn open(&mut self) -> Result<(), JsonError> {
        self.skip_whitespace();
        if !self.take(b'{') {
            self.skip()?;
            return Err(JsonError::Type);
        }
        self.depth += 1;
        if self.depth > JSON_DEPTH_MAX {
            return Err(JsonError::Depth);
        }
        self.skip_whitespace();
        Ok(())
    }

    /// The string that begins here, if it is one without escapes (and errors); otherwise nothing is
    /// consumed.
    #[inline]
    fn plain_string(&mut self) -> Option<&'a str> {
        if self.peek() != Some(b'"') {
            return None;
        }
        let start = self.position + 1;
        let end = string_run(self.text.as_bytes(), start);
        if self.text.as_bytes().get(end) != Some(&b'"') {
            return None;
        }
        self.position = end + 1;
        self.text.get(start..end)
    }

    /// The string that must begin here, with whatever escapes.
    #[cold]
    fn string_escaped(&mut self) -> Result<String, JsonError> {
        self.expect(b'"')?;
        let start = self.position;
        let bytes = self.text.as_bytes();
        let close = skip::string_rest(bytes, string_run(bytes, start))?;
        self.position = close + 1;
        self.text.get(start..close).map(unescape).ok_or(JsonError::Syntax)
    }

    /// Digits without a leading zero, as an integer; a fraction or an exponent is of another type.
    fn digits(&mut self) -> Result<u64, JsonError> {
        let start = self.position;
        let bytes = self.text.as_bytes();
        let mut value = 0u64;
        while let Some(digit @ b'0'..=b'9') = bytes.get(self.position) {
            let next = value.checked_mul(10).and_then(|v| v.checked_add(u64::from(digit - b'0')));
            value = next.ok_or(JsonError::Type)?;
            self.position += 1;
        }
        if bytes[start] == b'0' && self.position > start + 1 {
            return Err(JsonError::Syntax);
        }
        match bytes.get(self.position) {
            Some(b'.' | b'e' | b'E') => {
                skip::number(bytes, start)?;
                Err(JsonError::Type)
            }
            _ => Ok(value),
        }
    }

    fn literal(&mut self, literal: &str) -> Result<(), JsonError> {
        self.position = skip::literal(self.text.as_bytes(), self.position, literal)?;
        Ok(())
    }

    #[inline]
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.position).copied()
    }

    #[inline]
    fn take(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.position += usize::from(found);
        found
    }

    #[inline]
    fn expect(&mut self, byte: u8) -> Result<(), JsonError> {
        if self.take(byte) { Ok(()) } else { Err(JsonError::Syntax) }
    }

    #[inline]
    fn skip_whitespace(&mut self) {
        self.position = skip::whitespace(self.text.as_bytes(), self.position);
    }
}

/// The text that the body of a string with valid escapes stands for.
fn unescape(body: &str) -> String {
    let mut out = String::with_capacity(body.len());
    let mut rest = body;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let escape = rest.as_bytes()[at + 1];
        rest = &rest[at + 2..];
        if escape == b'u' {
            let (character, taken) = unescape_unicode(rest);
            out.push(character);
            rest = &rest[taken..];
        } else {
            out.push(unescape_short(escape));
        }
    }
    out.push_str(rest);
    out
}

fn unescape_short(escape: u8) -> char {
    match escape {
        b'b' => '\u{8}',
        b'f' => '\u{c}',
        b'n' => '\n',
        b'r' => '\r',
        b't' => '\t',
        other => char::from(other),
    }
}

/// The character of a `\u` escape whose digits are at the start of `rest`, with the bytes taken: 4, or
/// 10 for a surrogate pair. A surrogate without its other half is U+FFFD, and what follows it stands
/// for itself (RFC 8259 section 8.2 leaves it open; Go does this).
fn unescape_unicode(rest: &str) -> (char, usize) {
    let unit = hex4(rest.as_bytes());
    if let Some(character) = char::from_u32(unit) {
        return (character, 4);
    }
    let low = rest.get(4..10).filter(|next| next.starts_with("\\u")).map(|next| hex4(&next.as_bytes()[2..]));
    match (unit, low) {
        (0xd800..=0xdbff, Some(low @ 0xdc00..=0xdfff)) => {
            let code = 0x1_0000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
            (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 10)
        }
        _ => (char::REPLACEMENT_CHARACTER, 4),
    }
}

/// The value of four hexadecimal digits, validated before.
fn hex4(digits: &[u8]) -> u32 {
    digits.iter().take(4).fold(0, |value, digit| value << 4 | char::from(*digit).to_digit(16).unwrap_or(0))
}
