//! Why a flag does not take a value.

use std::error::Error as _;
use std::num::{IntErrorKind, ParseFloatError, ParseIntError};

use clap::error::{ContextKind, ContextValue};

const TOO_LARGE: &str = "it is too large";
const WHOLE: &str = "expected a whole number, and none below zero";

/// What is wrong with the value that a parsed flag was given, without the flag.
pub(crate) fn value_problem(error: &clap::Error) -> String {
    if let Some(source) = error.source() {
        let of_integer = source.downcast_ref::<ParseIntError>().map(ParseIntError::kind);
        return match of_integer {
            Some(IntErrorKind::PosOverflow) => TOO_LARGE.to_owned(),
            Some(_) => WHOLE.to_owned(),
            None if source.is::<ParseFloatError>() => "expected a number".to_owned(),
            // clap's own, of a type that it reads as a wider one.
            None if source.to_string().contains(" is not in 0..=") => {
                let is_negative = source.to_string().starts_with('-');
                if is_negative { WHOLE.to_owned() } else { TOO_LARGE.to_owned() }
            }
            None => source.to_string(),
        };
    }
    let meant = match error.get(ContextKind::SuggestedValue) {
        Some(ContextValue::String(meant)) => format!("; did you mean `{meant}`?"),
        _ => String::new(),
    };
    match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(values)) if !values.is_empty() => {
            format!("expected one of {}{meant}", values.join(", "))
        }
        _ => "not what the flag takes".to_owned(),
    }
}
