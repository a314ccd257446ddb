//! The table of `tandem bench kernels`, for a quick look at a few operations.

use tandem_kernels::ThreadPool;
use tandem_kernels::kv::KvType;
use tandem_kernels::pack::WeightType;
use tandem_kernels::quant::BlockFormat;
use tandem_kernels::roof::{Measured, ReadRoof, WORKING_SET_BYTES, attention, products};

/// Context of attention.
const CONTEXT: usize = 16384;

/// Measures and prints what `arguments` name: `MODEL OP FORMAT,.. ROWS,.. ROUNDS THREADS`, where `all` and what
/// is not given stand for every model, every operation, some formats and numbers of rows.
///
/// # Panics
/// If a number is not one.
pub fn print(arguments: &[String]) {
    let argument =
        |i: usize, default: &str| arguments.get(i).map_or_else(|| default.to_owned(), String::clone);
    let (model, op) = (argument(0, "all"), argument(1, "all"));
    let formats = argument(2, "Q4_0,Q8_0,Q4_K,Q6_K,f16");
    let is_wanted = |name: &str| formats.split(',').any(|format| format == name);
    let number = |text: &str| text.parse::<usize>().expect("a number");
    let rows: Vec<usize> = argument(3, "1,2,4,6,8,16,64,512").split(',').map(number).collect();
    let rounds = number(&argument(4, "5"));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let pool = ThreadPool::new(number(&argument(5, &threads.to_string())));
    let read = ReadRoof::new(WORKING_SET_BYTES);
    println!("{} threads, {}; the fastest of {rounds} rounds", pool.threads(), pool.isa());
    println!("op               format rows         ms  to first   GB/s   GOPS of reading of arithmetic");
    let is_named = |name: &str, wanted: &str| wanted == "all" || name == wanted;
    let dense = [WeightType::F32, WeightType::Bf16, WeightType::F16];
    for shape in products::SHAPES {
        if !is_named(shape.model, &model) || !is_named(shape.op, &op) {
            continue;
        }
        for weight_type in dense.into_iter().chain(BlockFormat::ALL.map(WeightType::Quantized)) {
            let name = weight_type.to_string();
            if is_wanted(&name) {
                let lines = products::measure(&pool, &read, shape, weight_type, &rows, rounds);
                print_lines(&format!("{} {}", shape.model, shape.op), &name, &lines.unwrap_or_default());
            }
        }
    }
    for shape in attention::SHAPES {
        for kv_type in KvType::ALL {
            if is_named(shape.model, &model) && is_named("attention", &op) && is_wanted(kv_type.name()) {
                let lines = attention::measure(&pool, &read, shape, (kv_type, CONTEXT), &rows, rounds);
                print_lines(&format!("{} attention", shape.model), kv_type.name(), &lines);
            }
        }
    }
}

fn print_lines(op: &str, format: &str, lines: &[Measured]) {
    for line in lines {
        println!(
            "{op:16} {format:6} {:4} {:10.3} {:9.2} {:6.1} {:6.0} {:9.0}% {:12.0}%",
            line.rows,
            line.seconds * 1e3,
            line.seconds / lines[0].seconds,
            line.bytes / line.seconds / 1e9,
            line.operations / line.seconds / 1e9,
            100.0 * line.read_share(),
            100.0 * line.compute_share()
        );
    }
}
