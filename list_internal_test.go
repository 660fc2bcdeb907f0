package smtprelay

// What belongs here: tests of list, the queue of those who wait and of free connections.

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func TestListKeepsItsOrderWhateverIsTakenOut(t *testing.T) {
	type element struct {
		links[element]
		n int
	}
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		l := list[element]{links: func(e *element) *links[element] { return &e.links }}
		var want []*element
		for step := range 100 {
			switch k := r.IntN(3); {
			case k == 0:
				e := &element{n: step}
				l.pushBack(e)
				want = append(want, e)
			case k == 1:
				e := &element{n: step}
				l.pushFront(e)
				want = slices.Insert(want, 0, e)
			case len(want) > 0:
				i := r.IntN(len(want))
				want[i].remove()
				want[i].remove() // it is in no list any more
				want = slices.Delete(want, i, i+1)
			}
			var forwards, backwards []*element
			for e := l.first; e != nil; e = e.next {
				forwards = append(forwards, e)
			}
			for e := l.last; e != nil; e = e.prev {
				backwards = append(backwards, e)
			}
			slices.Reverse(backwards)
			if l.len != len(want) || !slices.Equal(forwards, want) || !slices.Equal(backwards, want) {
				t.Fatalf("seed %d, step %d: %d elements, %d forwards, %d backwards, want %d", seed, step, l.len, len(forwards), len(backwards), len(want))
			}
		}
	}
}
