//! The instruction set in use: found once, or forced by `TANDEM_ISA`.

#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;
use std::fmt;
use std::sync::OnceLock;

/// The environment variable that forces an instruction set.
pub const ISA_VARIABLE: &str = "TANDEM_ISA";

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust: the specification. Runs everywhere.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// 64-bit Arm with NEON, which all have.
    Neon,
    /// 64-bit Arm with NEON and its dot products of bytes (`dotprod`).
    NeonDot,
    /// 64-bit Arm with NEON and its products of tiles of bytes (`i8mm`).
    NeonI8mm,
}

/// `TANDEM_ISA` names something that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IsaError {
    /// Not one of the names.
    Unknown {
        /// What was asked for.
        value: String,
    },
    /// A known name that this processor lacks.
    Unavailable {
        /// What was asked for.
        isa: Isa,
        /// The best that this processor has.
        best: Isa,
    },
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IsaError::Unknown { value } => {
                write!(f, "{ISA_VARIABLE}={value}: no such instruction set; expected one of")?;
                for (i, isa) in Isa::ALL.iter().enumerate() {
                    write!(f, "{} {isa}", if i == 0 { "" } else { "," })?;
                }
                Ok(())
            }
            IsaError::Unavailable { isa, best } => {
                write!(f, "{ISA_VARIABLE}={isa}: this processor does not have it; its best is {best}")
            }
        }
    }
}

impl std::error::Error for IsaError {}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Isa {
    type Err = IsaError;

    fn from_str(value: &str) -> Result<Self, IsaError> {
        let found = Isa::ALL.into_iter().find(|isa| isa.name().eq_ignore_ascii_case(value.trim()));
        found.ok_or_else(|| IsaError::Unknown { value: value.to_owned() })
    }
}

impl Isa {
    /// Every instruction set; of those that one processor can have, slowest first.
    pub const ALL: [Isa; 6] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Neon, Isa::NeonDot, Isa::NeonI8mm];

    /// The name that `TANDEM_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
            Isa::NeonDot => "neon-dot",
            Isa::NeonI8mm => "neon-i8mm",
        }
    }

    /// True if this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => Isa::Neon.is_available() && is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => Isa::NeonDot.is_available() && is_aarch64_feature_detected!("i8mm"),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => false,
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => false,
        }
    }

    /// The fastest that this processor has.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar)
    }

    /// Those that this processor has, slowest first.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }
}

/// What `TANDEM_ISA` asks for, or the best that this processor has.
///
/// # Errors
/// If the variable holds an unknown name, or an instruction set that this processor lacks. A program
/// should call this once at start and show the error; [`active`] goes on with the best in that case.
pub fn detect() -> Result<Isa, IsaError> {
    match std::env::var(ISA_VARIABLE) {
        Ok(value) if !value.trim().is_empty() => choose(&value),
        _ => Ok(Isa::best()),
    }
}

fn choose(value: &str) -> Result<Isa, IsaError> {
    let isa: Isa = value.parse()?;
    if isa.is_available() { Ok(isa) } else { Err(IsaError::Unavailable { isa, best: Isa::best() }) }
}

/// The instruction set of this process: [`detect`]'s answer, asked once.
pub fn active() -> Isa {
    static ACTIVE: OnceLock<Isa> = OnceLock::new();
    *ACTIVE.get_or_init(|| detect().unwrap_or_else(|_| Isa::best()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_others_are_refused_with_the_list() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().to_uppercase().parse(), Ok(isa));
        }
        let message = choose("sse9").unwrap_err().to_string();
        assert!(
            message.contains("sse9") && message.contains("scalar, avx2, avx512, neon, neon-dot, neon-i8mm"),
            "{message}"
        );
    }

    #[test]
    fn what_the_environment_asks_for_is_there() {
        detect().expect("run the tests with an instruction set that this processor has, or with none");
        assert!(cfg!(not(target_arch = "aarch64")) || Isa::Neon.is_available(), "all 64-bit Arm has NEON");
    }

    #[test]
    fn an_available_choice_is_taken_and_a_missing_one_names_the_best() {
        for isa in Isa::ALL {
            match choose(isa.name()) {
                Ok(chosen) => assert_eq!(chosen, isa),
                Err(error) => assert_eq!(error, IsaError::Unavailable { isa, best: Isa::best() }),
            }
        }
    }
}
