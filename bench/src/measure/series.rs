//! A few repeated figures and what may be said of them: median, extremes, spread.

use serde::Serialize;

/// Median, least and greatest of repeated measurements of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Series {
    pub(crate) count: usize,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Series {
    /// `None` for no values. Values that are no numbers (a division by zero units) are left out.
    pub(crate) fn of(values: &[f64]) -> Option<Series> {
        let mut sorted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Series { count: sorted.len(), median, min, max })
    }

    /// Value by value quotients of two series of the same rounds.
    pub(crate) fn of_ratios(numerators: &[f64], denominators: &[f64]) -> Option<Series> {
        let ratios: Vec<f64> = numerators.iter().zip(denominators).map(|(a, b)| a / b).collect();
        Series::of(&ratios)
    }

    /// `5.61 (5.42–5.90)`.
    pub(crate) fn text(&self) -> String {
        format!("{:.2} ({:.2}–{:.2})", self.median, self.min, self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_extremes() {
        fn check(values: &[f64], expected: Option<(usize, f64, f64, f64)>) {
            let expected = expected.map(|(count, median, min, max)| Series { count, median, min, max });
            assert_eq!(Series::of(values), expected, "{values:?}");
        }
        check(&[], None);
        check(&[f64::NAN], None);
        check(&[2.0], Some((1, 2.0, 2.0, 2.0)));
        check(&[3.0, 1.0], Some((2, 2.0, 1.0, 3.0)));
        check(&[9.0, 1.0, 5.0, f64::INFINITY], Some((3, 5.0, 1.0, 9.0)));
    }

    #[test]
    fn ratios_are_paired() {
        let ratios = Series::of_ratios(&[2.0, 9.0, 8.0], &[1.0, 3.0, 2.0]).expect("three");
        assert_eq!((ratios.median, ratios.min, ratios.max), (3.0, 2.0, 4.0));
        assert_eq!(ratios.text(), "3.00 (2.00–4.00)");
    }
}
