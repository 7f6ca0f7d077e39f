use proptest::prelude::*;
use serde_json::Value;

use super::*;

fn check(text: &str, valid: bool) {
    assert_eq!(is_valid(text), valid, "{text:?}");
    let judge = serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok();
    assert_eq!(judge, valid, "serde_json on {text:?}");
}

#[test]
fn grammar() {
    for text in [
        "null",
        "true",
        "false",
        "0",
        "-0",
        "1.50",
        "-12.5e+10",
        "1E400",
        "123456789012345678901234567890",
        "\"\"",
        "\"a\"",
        r#""\"\\\/\b\f\n\r\t\u0041\uD83d\udE00""#,
        r#""\ud800""#,
        "\"\u{7f}\u{2028}ä😀\"",
        "[]",
        "{}",
        "[1]",
        "[1,2]",
        " [ 1 , 2 ] ",
        "{\"a\":1}",
        "{ \"a\" : { \"b\" : [ ] } , \"c\" : {} }",
        "\t\r\n[\n]\n",
        "[[[]],{}]",
        "{\"\":[{}]}",
        "\"12345678\"",
        "\"1234567\\n\"",
        "\"12345678901234567\"",
    ] {
        check(text, true);
    }
    for text in [
        "",
        " ",
        "nul",
        "nulll",
        "True",
        "01",
        "-",
        "+1",
        "1.",
        ".5",
        "1e",
        "1e+",
        "--1",
        "0x1",
        "1 2",
        "NaN",
        "\"",
        "\"a",
        "'a'",
        r#""\x""#,
        r#""\u12""#,
        r#""\u12g4""#,
        "\"\\",
        "\"\n\"",
        "\"\0\"",
        "\"1234567\t\"",
        "[",
        "]",
        "[1",
        "[1,",
        "[1,]",
        "[,1]",
        "[1 2]",
        "{",
        "}",
        "{1:2}",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{,}",
        "{\"a\":1 \"b\":2}",
        "{\"a\" 1}",
        "[1}",
        "{\"a\":1]",
        "[}",
        "{]",
        "[]]",
        "{}}",
        "\u{feff}1",
    ] {
        check(text, false);
    }
}

#[test]
fn the_depth_limit_is_exact() {
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let max = crate::limits::JSON_DEPTH_MAX as usize;
    assert!(is_valid(&nested(max)));
    assert!(!is_valid(&nested(max + 1)));
    let in_object = |depth: usize| {
        let text = format!("{{\"a\":{}}}", nested(depth));
        let mut scanner = Scanner::new(&text);
        scanner.object(|scanner, _| scanner.skip())
    };
    assert_eq!(in_object(max - 1), Ok(()));
    assert_eq!(in_object(max), Err(JsonError::Depth), "the object around it counts");
    let objects = |depth: usize| format!("{}1{}", "{\"a\":".repeat(depth), "}".repeat(depth));
    assert!(is_valid(&objects(max)) && !is_valid(&objects(max + 1)));
}

#[test]
#[expect(clippy::needless_pass_by_value, reason = "tables read better without references")]
fn integers_follow_go() {
    fn check<'t, T: PartialEq + std::fmt::Debug>(
        read: impl Fn(&mut Scanner<'t>) -> Result<T, JsonError>,
        text: &'t str,
        expected: Result<T, JsonError>,
    ) {
        let mut scanner = Scanner::new(text);
        let value = read(&mut scanner);
        if value.is_ok() {
            assert_eq!(scanner.end(), Ok(()), "{text}");
        }
        assert_eq!(value, expected, "{text}");
    }
    for (text, expected) in [
        ("0", Ok(0)),
        ("null", Ok(0)),
        ("4294967295", Ok(u32::MAX)),
        ("4294967296", Err(JsonError::Type)),
        ("-0", Err(JsonError::Type)),
        ("-1", Err(JsonError::Type)),
        ("1.0", Err(JsonError::Type)),
        ("1e3", Err(JsonError::Type)),
        ("1.", Err(JsonError::Syntax)),
        ("1e", Err(JsonError::Syntax)),
        ("01", Err(JsonError::Syntax)),
        ("\"1\"", Err(JsonError::Type)),
        ("true", Err(JsonError::Type)),
        ("{}", Err(JsonError::Type)),
        ("nil", Err(JsonError::Syntax)),
        ("99999999999999999999999", Err(JsonError::Type)),
        ("", Err(JsonError::Syntax)),
    ] {
        check(Scanner::u32, text, expected);
    }
    check(Scanner::u64, "18446744073709551615", Ok(u64::MAX));
    check(Scanner::u64, "18446744073709551616", Err(JsonError::Type));
    check(Scanner::i64, "-9223372036854775808", Ok(i64::MIN));
    check(Scanner::i64, "-9223372036854775809", Err(JsonError::Type));
    check(Scanner::i64, "9223372036854775807", Ok(i64::MAX));
    check(Scanner::i64, "9223372036854775808", Err(JsonError::Type));
    check(Scanner::i64, "-", Err(JsonError::Syntax));
    check(Scanner::i64, "-null", Err(JsonError::Syntax));
    check(Scanner::i32, "-2147483648", Ok(i32::MIN));
    check(Scanner::i32, "2147483648", Err(JsonError::Type));
}

#[test]
fn strings_and_booleans() {
    fn check(text: &str, expected: Result<&str, JsonError>) {
        let mut scanner = Scanner::new(text);
        assert_eq!(scanner.string().as_deref(), expected.as_ref().copied(), "{text}");
    }
    check("\"plain ä\"", Ok("plain ä"));
    check("null", Ok(""));
    check("5", Err(JsonError::Type));
    check(r#""\"\\\/\b\f\n\r\t\u00e4""#, Ok("\"\\/\u{8}\u{c}\n\r\tä"));
    check(r#""x\ud83d\ude00y""#, Ok("x😀y"));
    check(r#""\ud83d""#, Ok("\u{fffd}"));
    check(r#""\ude00\ud83d""#, Ok("\u{fffd}\u{fffd}"));
    check(r#""\ud83d\u0041""#, Ok("\u{fffd}A"));
    check(r#""\ud83d\ud83d\ude00""#, Ok("\u{fffd}😀"));
    check(r#""\ud83d\n""#, Ok("\u{fffd}\n"));
    check(r#""\ud83däää""#, Ok("\u{fffd}äää"));
    let borrowed = Scanner::new("\"no escapes\"").string();
    assert!(matches!(borrowed, Ok(std::borrow::Cow::Borrowed(_))));
    for (text, expected) in
        [("true", Ok(true)), ("false", Ok(false)), ("null", Ok(false)), ("1", Err(JsonError::Type))]
    {
        assert_eq!(Scanner::new(text).boolean(), expected);
    }
}

#[test]
fn written_strings_are_what_go_writes() {
    for (text, expected) in [
        ("", r#""""#),
        ("room:general", r#""room:general""#),
        ("a\"b\\c", r#""a\"b\\c""#),
        ("\n\r\t\u{8}\u{c}\u{1f}\0", r#""\n\r\t\u0008\u000c\u001f\u0000""#),
        ("<a href='x'>&amp;", r#""\u003ca href='x'\u003e\u0026amp;""#),
        ("ä€😀\u{7f}", "\"ä€😀\u{7f}\""),
        ("long enough \u{2028} and \u{2029} \u{202a}", "\"long enough \\u2028 and \\u2029 \u{202a}\""),
    ] {
        let mut out = Vec::new();
        write_string(&mut out, text);
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}

#[test]
fn raw_values_lose_newlines_only() {
    for (raw, expected) in
        [("1.50", "1.50"), ("{\n \"a\": 1\r\n}\n", "{ \"a\": 1\r}"), ("", "null"), ("\n\n", "null")]
    {
        let mut out = Vec::new();
        write_raw(&mut out, raw.as_bytes());
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        "[a-z\"\\\\\n\u{1}ä😀]{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::hash_map("[a-z\"\\\\ä]{0,6}", inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Text that is nearly JSON: pieces of it in any order.
fn nearly_json() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "{", "}", "[", "]", ",", ":", "\"a\"", "\"", "\\", "\\u00e9", "\\ud800", "1", "-1.5e3", "0", ".",
        "e", "true", "null", "fals", " ", "\n", "\t", "ä", "\u{1}", "\"key\":", "{}", "[]", "12345678",
        "\"x\\n\"",
    ]);
    prop::collection::vec(piece, 0..14).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn accepts_and_rejects_what_serde_json_does(text in nearly_json()) {
        let judge = serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok();
        prop_assert_eq!(is_valid(&text), judge, "{:?}", text);
    }

    #[test]
    fn any_document_is_accepted_and_broken_ones_are_not(value in any_json(), pretty: bool, cut: prop::sample::Index) {
        let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.unwrap();
        prop_assert!(is_valid(&text));
        prop_assert_eq!(Scanner::new(&text).raw(), Ok(text.as_str()));
        let cut = text.floor_char_boundary(cut.index(text.len()));
        let head = &text[..cut];
        prop_assert_eq!(is_valid(head), serde_json::from_str::<Value>(head).is_ok());
    }

    #[test]
    fn strings_have_the_same_value(text: String, padding in "[a-z]{0,20}") {
        let text = padding + &text;
        for json in [serde_json::to_string(&text).unwrap(), {
            let mut out = Vec::new();
            write_string(&mut out, &text);
            String::from_utf8(out).unwrap()
        }] {
            prop_assert_eq!(Scanner::new(&json).string().unwrap(), text.as_str());
            prop_assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text.as_str());
        }
    }

    #[test]
    fn escaped_units_have_the_same_value_as_in_utf16(units in prop::collection::vec(any::<u16>(), 0..8)) {
        let body: String = units.iter().map(|unit| format!("\\u{unit:04X}")).collect();
        let json = format!("\"{body}\"");
        prop_assert_eq!(Scanner::new(&json).string().unwrap(), String::from_utf16_lossy(&units));
    }

    #[test]
    fn integers_have_the_same_value(number: i64) {
        let text = number.to_string();
        prop_assert_eq!(Scanner::new(&text).i64(), Ok(number));
        prop_assert_eq!(Scanner::new(&text).u64().ok(), u64::try_from(number).ok());
        prop_assert_eq!(Scanner::new(&text).u32().ok(), u32::try_from(number).ok());
        prop_assert_eq!(Scanner::new(&text).i32().ok(), i32::try_from(number).ok());
    }
}
