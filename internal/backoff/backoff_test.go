package backoff

import (
	"math"
	"testing"
	"time"
)

func TestDoubled(t *testing.T) {
	const least, most = 500 * time.Millisecond, 30 * time.Second
	for failures, want := range map[int]time.Duration{
		1: least, 2: time.Second, 3: 2 * time.Second, 6: 16 * time.Second, 7: most, 8: most, 64: most, 65: most, math.MaxInt: most,
	} {
		if got := Doubled(least, most, failures); got != want {
			t.Errorf("after %d failures %v, want %v", failures, got, want)
		}
	}
	if got := Doubled(most, most, 1); got != most {
		t.Errorf("%v, want %v", got, most)
	}
}

func TestJitteredIsPositiveAndAtMostDoubled(t *testing.T) {
	seen := make(map[time.Duration]bool)
	for range 1000 {
		wait := Jittered(4, 100, 2)
		if wait < 1 || wait > 8 {
			t.Fatalf("%d, want 1 to 8", wait)
		}
		seen[wait] = true
	}
	if len(seen) != 8 {
		t.Errorf("%d different waits of 8", len(seen))
	}
}
