// Package steptrace checks the machine instructions that make a volume
// durable. It has tests only.
//
// The crash simulator sees the calls of pmem's primitives, not what they
// compile to. Here the test runs its own binary as a child that works on a
// real region, follows it instruction by instruction under ptrace, and notes
// each store into the region, each CLWB, CLFLUSHOPT, CLFLUSH and each fence.
// The trace is then played into the memory of pmem/sim, and regions as a power
// failure could leave them are recovered with the real code.
//
//	child                          parent
//	nvmmirror.Create, Open,   →    step, decode, note what touches the region
//	Commit, Close ...         →    compare the region with the stores noted
//	                               trace → pmem/sim → crash images → nvmmirror.Open
//
// A store that the decoder missed shows: the parent has the region mapped too,
// and compares it with the stores that it noted, around each store and as a
// whole at each fence.
package steptrace
