//! The form of SNOMED CT identifiers.

/// Whether `code` has the form of a SNOMED CT concept identifier: 6 to 18 digits, partition 00 or 10, and a
/// right Verhoeff check digit (SNOMED CT Release File Specifications, §6). A mistyped digit is caught without
/// a copy of the terminology.
pub(crate) fn is_concept_id(code: &str) -> bool {
    const PERMUTATION: [usize; 10] = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4];
    let Some(digits) = code.chars().map(|c| c.to_digit(10).map(|d| d as usize)).collect::<Option<Vec<_>>>()
    else {
        return false;
    };
    if !(6..=18).contains(&digits.len()) || digits[0] == 0 {
        return false;
    }
    let partition = &digits[digits.len() - 3..digits.len() - 1];
    let permuted = |(position, digit): (usize, &usize)| (0..position % 8).fold(*digit, |d, _| PERMUTATION[d]);
    let check = digits.iter().rev().enumerate().map(permuted).fold(0, dihedral);
    matches!(partition, [0 | 1, 0]) && check == 0
}

/// The product in the dihedral group of the pentagon, on which Verhoeff's check rests.
fn dihedral(a: usize, b: usize) -> usize {
    match (a < 5, b < 5) {
        (true, true) => (a + b) % 5,
        (true, false) => (a + b - 5) % 5 + 5,
        (false, true) => (a - 5 + 5 - b) % 5 + 5,
        (false, false) => (a + 5 - b) % 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_concept_id_carries_a_check_digit() {
        for good in ["66643007", "181491009", "43067004", "73897004", "1902009", "371311000", "8001006"] {
            assert!(is_concept_id(good), "{good}");
        }
        for bad in
            ["66643070", "66643008", "6664300", "", "12345", "0066643007", "6664300x", "1234567890123456789"]
        {
            assert!(!is_concept_id(bad), "{bad}");
        }
    }
}
