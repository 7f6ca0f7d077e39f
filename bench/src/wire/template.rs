//! Requests prepared once: a masked frame whose numbers have a fixed width and are patched in place.
//!
//! Sending is then a copy and a few XORs, so the client core can outrun the server, and every request of a kind has
//! the same number of bytes, which is what lets a bare TCP server count requests without parsing them.

use super::frame::{MASK, Opcode, client_header_bytes, push_client_frame};

/// A number inside the payload: `width` decimal digits at `at` bytes from the start of the frame.
#[derive(Clone, Copy, Debug)]
struct Field {
    at: usize,
    payload_index: usize,
    width: usize,
}

/// A prepared client frame with zero or more numbers to fill in.
#[derive(Clone, Debug)]
pub(crate) struct Template {
    frame: Vec<u8>,
    fields: Vec<Field>,
}

/// Builds a [`Template`] from text and numbers, in the order in which they are written.
#[derive(Debug, Default)]
pub(crate) struct TemplateBuilder {
    payload: Vec<u8>,
    fields: Vec<(usize, usize)>,
}

impl TemplateBuilder {
    pub(crate) fn text(mut self, text: &str) -> Self {
        self.payload.extend_from_slice(text.as_bytes());
        self
    }

    /// A number of exactly `width` digits, given later to [`Template::append`].
    pub(crate) fn digits(mut self, width: usize) -> Self {
        self.fields.push((self.payload.len(), width));
        self.payload.resize(self.payload.len() + width, b'0');
        self
    }

    pub(crate) fn finish(self, opcode: Opcode) -> Template {
        let header = client_header_bytes(self.payload.len());
        let mut frame = Vec::with_capacity(header + self.payload.len());
        push_client_frame(&mut frame, opcode, &self.payload);
        let field = |&(payload_index, width)| Field { at: header + payload_index, payload_index, width };
        Template { frame, fields: self.fields.iter().map(field).collect() }
    }
}

impl Template {
    pub(crate) fn builder() -> TemplateBuilder {
        TemplateBuilder::default()
    }

    /// The size of the frame on the wire, the same for all values.
    pub(crate) fn wire_bytes(&self) -> usize {
        self.frame.len()
    }

    /// Appends the frame with its numbers set to `values`, in the order of [`TemplateBuilder::digits`]. A number
    /// too large for its width keeps its lowest digits.
    pub(crate) fn append(&self, out: &mut Vec<u8>, values: &[u64]) {
        debug_assert_eq!(values.len(), self.fields.len());
        let base = out.len();
        out.extend_from_slice(&self.frame);
        for (field, &value) in self.fields.iter().zip(values) {
            let mut rest = value;
            for digit in (0..field.width).rev() {
                let masked = (b'0' + (rest % 10) as u8) ^ MASK[(field.payload_index + digit) & 3];
                out[base + field.at + digit] = masked;
                rest /= 10;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(frame: &[u8]) -> String {
        let header = if frame[1] & 0x7f == 126 { 8 } else { 6 };
        frame[header..].iter().enumerate().map(|(i, byte)| char::from(byte ^ MASK[i & 3])).collect()
    }

    #[test]
    fn fills_numbers_in_and_keeps_the_size() {
        let template = Template::builder().text("{\"id\":").digits(4).text(",c").digits(3).text("}");
        let template = template.finish(Opcode::Text);
        for (values, expected) in [
            ([7, 12], "{\"id\":0007,c012}"),
            ([9999, 999], "{\"id\":9999,c999}"),
            ([10_000, 1_000], "{\"id\":0000,c000}"),
        ] {
            let mut out = vec![1, 2, 3];
            template.append(&mut out, &values);
            assert_eq!(out.len(), 3 + template.wire_bytes());
            assert_eq!(payload(&out[3..]), expected);
        }
    }

    #[test]
    fn works_behind_a_long_header_too() {
        let template = Template::builder().text(&"x".repeat(200)).digits(2).finish(Opcode::Text);
        let mut out = Vec::new();
        template.append(&mut out, &[42]);
        assert!(payload(&out).ends_with("x42"));
    }
}
