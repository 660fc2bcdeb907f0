package nodes

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

func TestOrderOfAddresses(t *testing.T) {
	a, b, c := netip.MustParseAddrPort("[2001:db8::1]:25"), netip.MustParseAddrPort("192.0.2.1:25"), netip.MustParseAddrPort("192.0.2.2:25")
	all := []netip.AddrPort{a, b, c}
	var start time.Time
	type failure struct {
		addr      netip.AddrPort
		began, at time.Duration
	}
	for _, tt := range []struct {
		name   string
		failed []failure
		worked []netip.AddrPort // after that
		prefer netip.AddrPort
		now    time.Duration
		want   []netip.AddrPort
	}{
		{name: "that of the resolver", want: all},
		{name: "who has failed is last", failed: []failure{{a, 0, 1}}, now: 2, want: []netip.AddrPort{b, c, a}},
		{name: "of two that have failed the resolver's order", failed: []failure{{b, 0, 1}, {a, 1, 2}}, now: 2, want: []netip.AddrPort{c, a, b}},
		{name: "all have failed", failed: []failure{{c, 0, 1}, {a, 1, 2}, {b, 2, 3}}, now: 4, want: all},
		{name: "not for long", failed: []failure{{a, 0, 1}}, now: firstPause + 1, want: all},
		{name: "until then", failed: []failure{{a, 0, 1}}, now: firstPause, want: []netip.AddrPort{b, c, a}},
		{name: "twice as long the second time", failed: []failure{{a, 0, 1}, {a, 1, 2}}, now: 2 * firstPause, want: []netip.AddrPort{b, c, a}},
		{name: "failures together count once", failed: []failure{{a, 0, 1}, {a, 0, 2}, {a, 0, 3}}, now: firstPause + 1, want: all},
		{name: "ten minutes at most", failed: slices.Repeat([]failure{{a, 0, 0}}, 100), now: longestPause, want: all},
		{name: "success ends it", failed: []failure{{a, 0, 1}}, worked: []netip.AddrPort{a}, now: 2, want: all},
		{name: "the one preferred", failed: []failure{{b, 0, 1}}, prefer: b, now: 2, want: []netip.AddrPort{b, a, c}},
		{name: "one preferred that is gone", prefer: netip.MustParseAddrPort("192.0.2.9:25"), want: all},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var n Health
			for _, f := range tt.failed {
				n.Failed(f.addr, start.Add(f.began), start.Add(f.at))
			}
			for _, addr := range tt.worked {
				n.Worked(addr)
			}
			if got := n.Order(all, tt.prefer, start.Add(tt.now)); !slices.Equal(got, tt.want) {
				t.Errorf("%v, want %v", got, tt.want)
			}
		})
	}
}

// When the time of an address that has failed is over, one dial finds out whether it works. The others do not wait with it.
func TestOneDialAtATimeTriesAnAddressAgain(t *testing.T) {
	a, b := netip.MustParseAddrPort("192.0.2.1:25"), netip.MustParseAddrPort("192.0.2.2:25")
	var n Health
	var now time.Time
	n.Failed(a, now, now)
	now = now.Add(firstPause)
	var first []netip.AddrPort
	for range 3 {
		first = append(first, n.Order([]netip.AddrPort{a, b}, netip.AddrPort{}, now)[0])
	}
	if want := []netip.AddrPort{a, b, b}; !slices.Equal(first, want) {
		t.Errorf("tried first: %v, want %v", first, want)
	}
}

func TestAddressesThatTheNameHasNoMoreAreForgotten(t *testing.T) {
	var n Health
	var now time.Time
	for i := range 1000 {
		now = now.Add(time.Minute)
		n.Failed(netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), 25), now, now)
	}
	if most := int(kept/time.Minute) + 1; len(n.ill) > most {
		t.Errorf("%d are known, want at most %d", len(n.ill), most)
	}
}
