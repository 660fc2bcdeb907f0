package list

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func TestListKeepsItsOrderWhateverIsTakenOut(t *testing.T) {
	type element struct {
		Links[element]
		n int
	}
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		l := New(func(e *element) *Links[element] { return &e.Links })
		var want []*element
		for step := range 100 {
			switch k := r.IntN(3); {
			case k == 0:
				e := &element{n: step}
				l.PushBack(e)
				want = append(want, e)
			case k == 1:
				e := &element{n: step}
				l.PushFront(e)
				want = slices.Insert(want, 0, e)
			case len(want) > 0:
				i := r.IntN(len(want))
				want[i].Remove()
				want[i].Remove() // it is in no list any more
				want = slices.Delete(want, i, i+1)
			}
			var forwards, backwards []*element
			for e := l.First; e != nil; e = e.Next {
				forwards = append(forwards, e)
			}
			for e := l.Last; e != nil; e = e.Prev {
				backwards = append(backwards, e)
			}
			slices.Reverse(backwards)
			if l.Len != len(want) || !slices.Equal(forwards, want) || !slices.Equal(backwards, want) {
				t.Fatalf("seed %d, step %d: %d elements, %d forwards, %d backwards, want %d", seed, step, l.Len, len(forwards), len(backwards), len(want))
			}
		}
	}
}
