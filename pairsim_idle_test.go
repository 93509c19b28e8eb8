package nvmmirror

import (
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

// What a node that has nothing to do leaves for later, and for whom it hurries.

// A primary takes in the answer to a heartbeat when it sends the next one. A
// read that finds the lease run out does not wait for that.
func TestReadTakesTheAnswerThatIsThere(t *testing.T) {
	direct(t, 20, Options{}, func(d *simScript) {
		d.begin()
		d.partition(true)
		lease := d.timeout / 2
		d.sleep(lease + lease/10)
		d.settle()
		d.a.read()
		d.settle()
		d.whole("read without a lease")
		if d.stats.reads > 0 {
			d.t.Fatalf("seed %d: a read was served without a lease", d.seed)
		}
		d.partition(false)
		for d.step(true) { // b answers the last heartbeat; no time passes
			d.settle()
			d.whole("answered")
		}
		if d.a.serves() {
			d.t.Fatalf("seed %d: the answer was taken already", d.seed)
		}
		d.a.read()
		d.settle()
		d.whole("read")
		if d.stats.reads != 1 {
			d.t.Fatalf("seed %d: the read did not take the answer in", d.seed)
		}
	})
}

// A checkpointer that rests is woken by what is applied: the log is checkpointed
// as soon as the node was idle for a second, as if it had never rested.
func TestCheckpointerRests(t *testing.T) {
	// The requests that it leaves in their pool have channels of its bubble, which
	// end the process outside of it. Two collections empty a pool.
	defer runtime.GC()
	defer runtime.GC()
	synctest.Test(t, func(t *testing.T) {
		v := found(t, Options{})
		v.wg.Go(v.checkpointer)
		for range 3 {
			time.Sleep(restingEvery + time.Second)
			synctest.Wait()
			if !v.resting.Load() {
				t.Fatal("it does not rest")
			}
			if _, err := v.WriteAt([]byte("woken"), 0); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2*checkpointEvery + time.Millisecond)
			synctest.Wait()
			if v.Checkpoint() != v.Applied() || v.ackedUnstored() {
				t.Fatalf("checkpoint at %d, applied up to %d", v.Checkpoint(), v.Applied())
			}
		}
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
