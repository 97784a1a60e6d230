//! Weights that a tool has quantized: the components of a tensor, which lie in tensors of their own, become one entry.
//!
//! Owns: the names, shapes and types that bitsandbytes, GPTQ, AWQ, HQQ, MLX and FP8 tools give components, and the facts in
//! config.json that say how they are to be read. Refuses to know: what the codes mean ([`crate::quant`]), files.
//!
//! `PA-1`: a component whose type or shape is not what the encoding makes of the tensor's shape is refused, so a plan can
//! copy its bytes as they are.

mod bitsandbytes;
mod config;
mod fp8;
mod gptq;
mod hqq;
mod mlx;

use serde::{Deserialize, Serialize};

use self::config::{Method, QuantizationConfig};
use super::{Encoding, FormatError, ModelIndex, TensorEntry};
use crate::quant::Encoding as Quantized;
use crate::types::{ByteRange, DType, Fqn, Shape, f32Bits};

/// A component of this size or less may be read while a model is opened.
const MAX_SMALL_BYTES: u64 = 64 << 10;

/// A quantized tensor as a tool has written it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedTensor {
    /// What it is.
    pub encoding: Quantized,
    /// For each component of the encoding but the nested offset, in order, its file and bytes.
    pub parts: Vec<(u32, ByteRange)>,
    /// The mean of nested statistics, where the encoding has one.
    pub nested_offset: Option<f32Bits>,
}

/// Gives the bytes of a tensor of an index.
pub type ReadSmall<'a, E> = &'a mut dyn FnMut(&ModelIndex, &TensorEntry) -> Result<Vec<u8>, E>;

/// Turns the components in `index` into tensors `<module>.weight`. `config_json` says by which tool and how; `read` gives the
/// bytes of a small tensor. An index without components is returned as it is.
///
/// # Errors
/// [`FormatError::Packed`], naming the tensor, what was expected and what was found; and what `read` returns.
pub fn gather<E: From<FormatError>>(
    index: ModelIndex,
    config_json: Option<&[u8]>,
    read: ReadSmall<'_, E>,
) -> Result<ModelIndex, E> {
    let config = QuantizationConfig::parse(config_json)?;
    let mut gather = Gather { index, read, weight_dtype: config.weight_dtype };
    match config.method {
        Some(Method::Gptq { bits, group, version }) => gptq::gptq(&mut gather, (bits, group, version))?,
        Some(Method::Awq { group }) => gptq::awq(&mut gather, group)?,
        Some(Method::Mlx { bits, group, modules }) => mlx::gather(&mut gather, (bits, group), &modules)?,
        Some(Method::Fp8 { block }) => fp8::gather(&mut gather, block)?,
        // Both say all in their tensors.
        Some(Method::Hqq | Method::BitsAndBytes) | None => {
            hqq::gather(&mut gather)?;
            bitsandbytes::gather(&mut gather)?;
        }
    }
    Ok(gather.index)
}

/// An index in which components become tensors.
struct Gather<'a, E> {
    index: ModelIndex,
    read: ReadSmall<'a, E>,
    /// The type that weights stand for where nothing but config.json says it.
    weight_dtype: DType,
}

/// What is wrong with a component.
fn wrong(tensor: impl Into<String>, what: &'static str, expected: impl Into<String>, found: String) -> FormatError {
    FormatError::Packed { tensor: tensor.into(), what, expected: expected.into(), found }
}

impl<E: From<FormatError>> Gather<'_, E> {
    /// The modules that have a tensor `<module><suffix>`.
    fn modules(&self, suffix: &str) -> Vec<String> {
        self.index.tensors.keys().filter_map(|name| name.as_str().strip_suffix(suffix)).map(str::to_owned).collect()
    }

    /// Takes a tensor out of the index.
    fn take(&mut self, name: String) -> Result<TensorEntry, FormatError> {
        let found = self.index.tensors.remove(name.as_str());
        found.ok_or_else(|| wrong(name, "a component", "a tensor", "none".to_owned()))
    }

    /// Takes those of a module's tensors out of the index that carry nothing which is not known otherwise.
    fn drop_all(&mut self, module: &str, suffixes: &[&str]) {
        for suffix in suffixes {
            self.index.tensors.remove(format!("{module}{suffix}").as_str());
        }
    }

    /// The bytes of a small tensor.
    fn small(&mut self, name: &str, entry: &TensorEntry) -> Result<Vec<u8>, E> {
        if entry.range.len() > MAX_SMALL_BYTES {
            let expected = format!("at most {MAX_SMALL_BYTES} bytes");
            return Err(wrong(name, "a small tensor", expected, format!("{} bytes", entry.range.len())).into());
        }
        (self.read)(&self.index, entry)
    }

    /// Puts the tensor `name` of `shape` into the index, made of `parts`, whose types and shapes must be the encoding's.
    fn put(
        &mut self,
        name: String,
        (shape, dtype): (Shape, DType),
        encoding: Quantized,
        parts: Vec<(&'static str, TensorEntry)>,
        nested_offset: Option<f32Bits>,
    ) -> Result<(), FormatError> {
        let overflow =
            |source: crate::types::ShapeOverflow| wrong(&name, "a shape", "a size in 64 bits", source.to_string());
        let components = encoding.components(&shape).map_err(overflow)?;
        for (component, (part, entry)) in components.iter().zip(&parts) {
            let fits = component.dtype == entry.dtype
                && same_dims(&component.shape, &entry.shape)
                && component.bytes == entry.range.len();
            if !fits {
                let expected = format!("{} {}", component.dtype, component.shape);
                return Err(wrong(&name, part, expected, format!("{} {}", entry.dtype, entry.shape)));
            }
        }
        let first = parts.first().map(|(_, entry)| (entry.file, entry.range)).unwrap_or_default();
        let packed = PackedTensor {
            encoding,
            parts: parts.iter().map(|(_, entry)| (entry.file, entry.range)).collect(),
            nested_offset,
        };
        let entry =
            TensorEntry { dtype, shape, file: first.0, range: first.1, encoding: Encoding::Packed(Box::new(packed)) };
        match self.index.tensors.insert(Fqn::from(name.as_str()), entry) {
            None => Ok(()),
            Some(_) => Err(wrong(name, "a weight", "its components", "a tensor of its own beside them".to_owned())),
        }
    }
}

/// Whether two shapes differ in dims of size 1 at most.
fn same_dims(left: &Shape, right: &Shape) -> bool {
    let dims = |shape: &Shape| shape.0.iter().copied().filter(|size| *size != 1).collect::<Vec<_>>();
    dims(left) == dims(right)
}

/// Rows and columns of a matrix.
fn matrix(name: &str, entry: &TensorEntry) -> Result<(u64, u64), FormatError> {
    match entry.shape.0[..] {
        [rows, columns] => Ok((rows, columns)),
        _ => Err(wrong(name, "a weight", "a matrix", entry.shape.to_string())),
    }
}
