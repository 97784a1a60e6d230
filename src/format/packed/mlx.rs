//! MLX's affine mode: `weight` in u32 words, `scales` and `biases`, as mlx-lm writes them.

use std::collections::BTreeMap;

use super::{Gather, matrix, wrong};
use crate::format::FormatError;
use crate::quant::Encoding;
use crate::quant::affine::{CodeBits, MlxRule};
use crate::types::{Shape, as_usize};

pub(super) fn gather<E: From<FormatError>>(
    gather: &mut Gather<'_, E>,
    (bits, group): (CodeBits, u32),
    modules: &BTreeMap<String, (CodeBits, u32)>,
) -> Result<(), E> {
    for module in gather.modules(".scales") {
        let &(bits, group) = modules.get(&module).unwrap_or(&(bits, group));
        let rule = MlxRule::new(bits, as_usize(u64::from(group)));
        let rule = rule.map_err(|error| wrong(&module, "bits and group_size", "those of mlx", error.to_string()))?;
        let parts = ["weight", "scales", "biases"].into_iter();
        let parts = parts
            .map(|part| Ok((part, gather.take(format!("{module}.{part}"))?)))
            .collect::<Result<Vec<_>, FormatError>>()?;
        let (rows, words) = matrix(&module, &parts[0].1)?;
        let dtype = parts[1].1.dtype;
        if !dtype.is_weight_float() {
            return Err(wrong(&module, "scales", "F16, BF16 or F32", dtype.to_string()).into());
        }
        let columns = words.saturating_mul(32) / u64::from(bits.get());
        let encoding = Encoding::Mlx { rule, dtype };
        gather.put(format!("{module}.weight"), (Shape::from([rows, columns]), dtype), encoding, parts, None)?;
    }
    Ok(())
}
