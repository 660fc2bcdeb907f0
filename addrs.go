package smtprelay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// nodes are the addresses behind the relay's name, and which of them have failed not long ago. It is safe for concurrent use.
//
// A dial tries them in the resolver's order (RFC 6724), but for those that have failed: these come last for a while, which
// doubles each time. Where all of them have failed the order is the resolver's.
type nodes struct {
	mu  sync.Mutex
	ill map[netip.AddrPort]illness
}

// illness is what is known of an address that has failed and has not worked since.
type illness struct {
	times int       // it has failed; dials that failed together count once
	at    time.Time // when it failed last
	until time.Time // it is tried last until then
}

const (
	illFirst = 30 * time.Second
	illMost  = 10 * time.Minute
	illKept  = time.Hour // without news, before an address is forgotten that the name has no more
)

// order returns addrs in the order in which a dial that begins at now is to try them. prefer, if it is one of them, is the first.
//
// An address whose time is over is tried by one dial; to the others it is ill until that has come to something.
func (n *nodes) order(addrs []netip.AddrPort, prefer netip.AddrPort, now time.Time) []netip.AddrPort {
	n.mu.Lock()
	defer n.mu.Unlock()
	first, well, ill := addrs[:0:0], addrs[:0:0], addrs[:0:0]
	for _, addr := range addrs {
		switch i, failed := n.ill[addr]; {
		case addr == prefer:
			first = append(first, addr)
		case failed && now.Before(i.until):
			ill = append(ill, addr)
		default:
			well = append(well, addr)
		}
	}
	if len(first) == 0 && len(well) == 0 {
		return addrs
	}
	order := append(append(first, well...), ill...)
	if i, failed := n.ill[order[0]]; failed {
		i.until = latest(i.until, now.Add(illFirst))
		n.ill[order[0]] = i
	}
	return order
}

// failed notes that addr has failed in a dial that began to try it at began. It returns for how long addr is tried last, or 0
// where that is no news.
func (n *nodes) failed(addr netip.AddrPort, began, now time.Time) time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	i := n.ill[addr]
	if began.Before(i.at) {
		return 0 // it failed together with others
	}
	if n.ill == nil {
		n.ill = make(map[netip.AddrPort]illness)
	}
	for addr, i := range n.ill {
		if now.Sub(i.at) > illKept {
			delete(n.ill, addr)
		}
	}
	i.times++
	i.at = now
	pause := backoffUpTo(illFirst, illMost, i.times)
	i.until = now.Add(pause)
	n.ill[addr] = i
	return pause
}

// worked notes that addr works.
func (n *nodes) worked(addr netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.ill, addr)
}

// nodeFailed notes that the address has failed with e, in a dial that began to try it at began.
func (c *settings) nodeFailed(addr netip.AddrPort, e *Error, began time.Time) {
	if pause := c.nodes.failed(addr, began, time.Now()); pause > 0 {
		text := fmt.Sprintf("%v has failed and is tried after the relay's other addresses for %v: %s", addr, pause, strings.TrimPrefix(e.Error(), "smtprelay: "))
		c.profile.learned(LearnedInfo{Lesson: LessonAddress, Reply: e.Reply, Text: text})
	}
}

// ofNode reports whether e, of a dial, may be the fault of the one address that was tried, so that another one may work. Before AUTH
// all is but "too many connections" in words, which a relay counts over all its addresses, and a want of sockets here.
func (e *Error) ofNode() bool {
	switch e.Op {
	case OpDial:
		return !errors.Is(e.Err, syscall.EMFILE) && !errors.Is(e.Err, syscall.ENFILE)
	case OpGreeting, OpEHLO, OpSTARTTLS, OpTLS:
		return !e.Reply.says(saysTooManyConns, e.Op)
	}
	return false
}

// further reports whether e tells more of the relay than other, the error of another address: its words do, and a connection.
func (e *Error) further(other *Error) bool {
	came := func(e *Error) int {
		switch {
		case e.Op == OpDial:
			return 0
		case e.Reply.Code == 0:
			return 1
		}
		return 2
	}
	return came(e) > came(other)
}

// ofAll returns e, which remote has failed with, for a dial that has tried so many addresses in vain.
func (e *Error) ofAll(remote string, tried int) *Error {
	if tried > 1 {
		note := fmt.Errorf("this was %s; %d addresses of the relay were tried in vain", remote, tried)
		if e.Err != nil {
			note = fmt.Errorf("%w; %v", e.Err, note)
		}
		e.Err = note
	}
	return e
}

// lookup returns the addresses of the relay in the resolver's order. It takes limit at most, 0 for any time.
func (c *settings) lookup(ctx context.Context, limit time.Duration) ([]netip.AddrPort, error) {
	ctx, cancel := within(ctx, limit)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", c.host)
	if err != nil {
		// In the words of a net.Dialer.
		return nil, fmt.Errorf("%w; check host and port in Addr", &net.OpError{Op: "dial", Net: "tcp", Err: err})
	}
	port, err := strconv.ParseUint(c.port, 10, 16)
	if err != nil {
		return nil, err // it was checked
	}
	addrs := make([]netip.AddrPort, len(ips))
	for i, ip := range ips {
		addrs[i] = netip.AddrPortFrom(ip.Unmap(), uint16(port))
	}
	return addrs, nil
}

// maxNodes is how many addresses one dial tries of those that take the connection and fail after it (RFC 5321, 5.1 has two at least).
// The next dial begins with the others.
const maxNodes = 3

// tcpShare is how much of Timeouts.Dial one address may use while there are others: 3 seconds of 30, in which a SYN is sent
// twice.
const tcpShare = 10

// shareOf returns how long the TCP connect to one address may take, of so many that are still to be tried and of the time left
// to all of them. 0 means no limit.
func shareOf(limit, left time.Duration, addrs int) time.Duration {
	switch {
	case limit == 0 && addrs == 1:
		return 0
	case limit == 0:
		return defaultDial / tcpShare
	}
	left = max(left, 1) // 0 would be no limit
	if addrs == 1 {
		return left
	}
	return max(min(limit/tcpShare, left/time.Duration(addrs)), 1)
}
