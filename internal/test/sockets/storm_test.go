package sockets

import (
	"flag"
	"math/rand/v2"
	"os"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
)

// The storm on sockets: rounds of all kinds until enough messages were sent.
var (
	stormSends = flag.Int("sockets.sends", 2000, "minimum number of messages that TestStorm sends")
	stormSeed  = flag.Uint64("sockets.seed", 0, "the seed of TestStorm; 0 means a new one")
	stormRound = flag.Int("sockets.round", -1, "the one round of the seed that TestStorm runs")
	stormOnly  = flag.String("sockets.only", "", `the kinds of rounds that TestStorm runs, as a regular expression, such as "strict.*/chunks"`)
)

// stormKind names a kind of round.
type stormKind struct {
	relay    relayMake
	chunking bool
}

func (k stormKind) String() string {
	if k.chunking {
		return string(k.relay) + "/chunks"
	}
	return string(k.relay) + "/data"
}

func stormKinds(t *testing.T) (kinds []stormKind) {
	only := regexp.MustCompile(*stormOnly)
	for _, m := range relayMakes {
		for _, chunking := range []bool{false, true} {
			if raceDetector && chunking && (m == goSMTPClear || m == goSMTPTLS) {
				continue
			}
			if k := (stormKind{m, chunking}); only.MatchString(k.String()) {
				kinds = append(kinds, k)
			}
		}
	}
	if len(kinds) == 0 {
		t.Fatalf("-sockets.only=%s matches no kind of round", *stormOnly)
	}
	return kinds
}

func TestStorm(t *testing.T) {
	seed := *stormSeed
	if seed == 0 {
		seed = uint64(rand.Uint32())
	}
	kinds := stormKinds(t)
	t.Logf("-sockets.seed=%d", seed)
	goroutines, files := running(), openFiles()

	var mu sync.Mutex // guards the variables below
	var all tally
	perKind := map[stormKind]*tally{}
	rounds, reported := 0, 0
	next := func() (n int, more bool) {
		mu.Lock()
		defer mu.Unlock()
		if *stormRound >= 0 {
			rounds++
			return *stormRound, rounds == 1
		}
		rounds++
		return rounds - 1, all.sends < *stormSends || rounds <= len(kinds)
	}
	var workers sync.WaitGroup
	for range 2 * runtime.GOMAXPROCS(0) { // a round sometimes waits
		workers.Go(func() {
			for n, more := next(); more; n, more = next() {
				kind := kinds[n%len(kinds)]
				r := drawRound(seed<<32+uint64(n), kind.relay, kind.chunking, 1+n*1000)
				a := r.run(t)
				mu.Lock()
				all.add(a)
				if perKind[kind] == nil {
					perKind[kind] = &tally{}
				}
				perKind[kind].add(a)
				if a.bad() > 0 {
					t.Fail()
					if reported++; reported <= 5 {
						t.Logf("%v, %+v:\n\t%v\n\t%s\n\tagain: go test -run TestStorm -sockets.seed=%d -sockets.round=%d -sockets.only='%s' -count=20", kind,
							r.describe(), &a, strings.Join(a.faulty, "\n\t"), seed, n, *stormOnly)
					}
				}
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	for _, k := range kinds {
		if a := perKind[k]; a != nil && (testing.Verbose() || a.bad() > 0) {
			t.Logf("%-26v %v", k, a)
		}
	}
	t.Logf("%-26s %v", "in all", &all)
	if *stormRound < 0 && (all.accepted == 0 || all.notAccepted == 0 || all.unknown == 0) {
		t.Error("not every outcome occurred")
	}
	eventually(t, "all goroutines end", func() bool { return running() <= goroutines })
	eventually(t, "all descriptors are closed", func() bool { return openFiles() <= files })
	if t.Failed() && running() > goroutines {
		t.Log(stacks())
	}
}

// openFiles counts the descriptors of this process; 0 if the system does not tell.
func openFiles() int {
	list, _ := os.ReadDir("/proc/self/fd")
	return len(list)
}

// describe returns the plan of a round without its messages.
func (r *round) describe() round {
	d := *r
	d.senders = nil
	return d
}
