// Here belongs the order of a relay's addresses, and how long each may take. Dials to several belong into test/dial_test.go.
package smtprelay

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
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
		{name: "not for long", failed: []failure{{a, 0, 1}}, now: illFirst + 1, want: all},
		{name: "until then", failed: []failure{{a, 0, 1}}, now: illFirst, want: []netip.AddrPort{b, c, a}},
		{name: "twice as long the second time", failed: []failure{{a, 0, 1}, {a, 1, 2}}, now: 2 * illFirst, want: []netip.AddrPort{b, c, a}},
		{name: "failures together count once", failed: []failure{{a, 0, 1}, {a, 0, 2}, {a, 0, 3}}, now: illFirst + 1, want: all},
		{name: "ten minutes at most", failed: slices.Repeat([]failure{{a, 0, 0}}, 100), now: illMost, want: all},
		{name: "success ends it", failed: []failure{{a, 0, 1}}, worked: []netip.AddrPort{a}, now: 2, want: all},
		{name: "the one preferred", failed: []failure{{b, 0, 1}}, prefer: b, now: 2, want: []netip.AddrPort{b, a, c}},
		{name: "one preferred that is gone", prefer: netip.MustParseAddrPort("192.0.2.9:25"), want: all},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var n nodes
			for _, f := range tt.failed {
				n.failed(f.addr, start.Add(f.began), start.Add(f.at))
			}
			for _, addr := range tt.worked {
				n.worked(addr)
			}
			if got := n.order(all, tt.prefer, start.Add(tt.now)); !slices.Equal(got, tt.want) {
				t.Errorf("%v, want %v", got, tt.want)
			}
		})
	}
}

// When the time of an address that has failed is over, one dial finds out whether it works. The others do not wait with it.
func TestOneDialAtATimeTriesAnAddressAgain(t *testing.T) {
	a, b := netip.MustParseAddrPort("192.0.2.1:25"), netip.MustParseAddrPort("192.0.2.2:25")
	var n nodes
	var now time.Time
	n.failed(a, now, now)
	now = now.Add(illFirst)
	var first []netip.AddrPort
	for range 3 {
		first = append(first, n.order([]netip.AddrPort{a, b}, netip.AddrPort{}, now)[0])
	}
	if want := []netip.AddrPort{a, b, b}; !slices.Equal(first, want) {
		t.Errorf("tried first: %v, want %v", first, want)
	}
}

func TestAddressesThatTheNameHasNoMoreAreForgotten(t *testing.T) {
	var n nodes
	var now time.Time
	for i := range 1000 {
		now = now.Add(time.Minute)
		n.failed(netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), 25), now, now)
	}
	if most := int(illKept/time.Minute) + 1; len(n.ill) > most {
		t.Errorf("%d are known, want at most %d", len(n.ill), most)
	}
}

func TestTimeForOneOfSeveralAddresses(t *testing.T) {
	for _, tt := range []struct {
		limit, left time.Duration
		addrs       int
		want        time.Duration
	}{
		{30 * time.Second, 29 * time.Second, 1, 29 * time.Second},
		{30 * time.Second, 29 * time.Second, 2, 3 * time.Second},
		{30 * time.Second, 2 * time.Second, 2, time.Second},
		{30 * time.Second, -time.Second, 1, 1},
		{30 * time.Second, 0, 100, 1},
		{0, -time.Second, 1, 0},
		{0, -time.Second, 2, 3 * time.Second},
	} {
		if got := shareOf(tt.limit, tt.left, tt.addrs); got != tt.want {
			t.Errorf("of %v, %v left, %d addresses: %v, want %v", tt.limit, tt.left, tt.addrs, got, tt.want)
		}
	}
}

func TestWhatIsTheFaultOfOneAddress(t *testing.T) {
	for _, tt := range []struct {
		e    Error
		want bool
	}{
		{Error{Op: OpDial, Err: syscall.ECONNREFUSED}, true},
		{Error{Op: OpDial, Err: fmt.Errorf("socket: %w", syscall.EMFILE)}, false},
		{Error{Op: OpGreeting, Err: errors.New("connection lost")}, true},
		{Error{Op: OpGreeting, Reply: Reply{Code: 421, Message: "going down"}}, true},
		{Error{Op: OpGreeting, Reply: Reply{Code: 554, Message: "no"}}, true},
		{Error{Op: OpGreeting, Reply: Reply{Code: 421, Message: "too many connections from you"}}, false},
		{Error{Op: OpEHLO, Reply: Reply{Code: 421, Message: "going down"}}, true},
		{Error{Op: OpTLS, Err: errors.New("handshake")}, true},
		{Error{Op: OpSTARTTLS, Reply: Reply{Code: 454}}, true},
		{Error{Op: OpAuth, Reply: Reply{Code: 535}}, false},
		{Error{Op: OpAuth, Err: errors.New("connection lost")}, false},
		{Error{Op: OpData}, false}, // the question about refused chunks
	} {
		if got := tt.e.ofNode(); got != tt.want {
			t.Errorf("%v: %v, want %v", &tt.e, got, tt.want)
		}
	}
}
