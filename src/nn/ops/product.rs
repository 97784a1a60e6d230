//! Products of matrices: the one place that calls the library's kernel, which takes pointers.
//!
//! Called here and not through the tensor library, which zeroes each result on one thread before the kernel overwrites it,
//! and has no product that is added to what is there.

#![expect(unsafe_code, reason = "the kernel takes pointers")]

use super::matrix::View;

/// `scale * left · right`, row-major.
pub(super) fn product(left: View<'_>, right: View<'_>, scale: f32) -> Vec<f32> {
    let count = count(left, right);
    if left.columns() == 0 {
        return vec![0.0; count];
    }
    let mut out = Vec::with_capacity(count);
    kernel(out.as_mut_ptr(), false, (left, right), scale);
    // SAFETY: the capacity is `count`, and with at least one term in each sum the kernel wrote every value.
    unsafe { out.set_len(count) };
    out
}

/// Adds `scale * left · right` to `out`, row-major.
pub(super) fn add_product(out: &mut [f32], left: View<'_>, right: View<'_>, scale: f32) {
    let count = count(left, right);
    assert!(out.len() == count, "{} values for a product of {count}", out.len());
    kernel(out.as_mut_ptr(), true, (left, right), scale);
}

/// How many values the product has.
fn count(left: View<'_>, right: View<'_>) -> usize {
    assert!(left.columns() == right.rows(), "{} columns against {} rows", left.columns(), right.rows());
    left.rows() * right.columns()
}

/// `out` has room for the product. Where `add` is false, what is there is not read.
fn kernel(out: *mut f32, add: bool, (left, right): (View<'_>, View<'_>), scale: f32) {
    let (rows, inner, columns) = (left.rows(), left.columns(), right.columns());
    if rows == 0 || inner == 0 || columns == 0 {
        return;
    }
    let threads = match rayon::current_num_threads() {
        1 => gemm::Parallelism::None,
        threads => gemm::Parallelism::Rayon(threads),
    };
    let (left, left_strides) = left.checked();
    let (right, right_strides) = right.checked();
    // SAFETY: `checked` gives slices that hold every element of the two views, `out` holds `rows * columns` values by what
    // the two callers check, no reference to `out` overlaps the shared slices, and strides are in elements.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            inner,
            out,
            1,
            columns.cast_signed(),
            add,
            left.as_ptr(),
            left_strides[1].cast_signed(),
            left_strides[0].cast_signed(),
            right.as_ptr(),
            right_strides[1].cast_signed(),
            right_strides[0].cast_signed(),
            1.0,
            scale,
            false,
            false,
            false,
            threads,
        );
    }
}
