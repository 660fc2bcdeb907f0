// The cells of the matrix: which work, over which line, by which peers, and how often.

package main

import (
	"fmt"
	"slices"
	"time"
)

// cell is one kind of work, done by several peers.
type cell struct {
	RTT      int // ms
	TLS      tlsMode
	Senders  int
	Size     int
	Chunking bool // the relay offers it
	InFlight int  // of the raw sender and of the deep setting, with CHUNKING
	Reps     int  // runs of the peers that the targets name; the median counts
	Scale    int  // the amount of work, in percent
	Peers    []string
}

func (c cell) String() string {
	s := fmt.Sprintf("RTT %d ms, TLS %s, %s, %s", c.RTT, tlsWords[c.TLS], plural(c.Senders, "sender"), sizeWord(c.Size))
	if c.Chunking {
		s += ", the relay offers CHUNKING"
	}
	return s
}

var tlsWords = map[tlsMode]string{tlsNone: "off", tlsStart: "by STARTTLS", tlsImplicit: "implicit"}

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}

func sizeWord(n int) string {
	if n >= 1<<20 {
		return fmt.Sprintf("%d MB", n>>20)
	}
	return fmt.Sprintf("%d KB", n>>10)
}

// The relay's limits: 10 connections, 100 messages on each, the default of many relays.
const (
	maxConns    = 10
	maxMessages = 100
)

const (
	kilo = 1 << 10
	mega = 1 << 20
)

// The library's default with CHUNKING, and the deep setting measured beside it.
const (
	inFlightDefault = 4
	inFlightDeep    = 32
)

// key are the peers that the targets name; lines those of the plot and of most cells; few those of the cells where lockstep takes
// minutes.
var (
	key   = []string{"smtprelay", "raw DATA", "two round trips", "nodemailer"}
	lines = []string{"smtprelay", "raw DATA", "mox", "nodemailer", "net/smtp kept", "net/smtp SendMail"}
	few   = []string{"smtprelay", "raw DATA", "two round trips", "mox", "nodemailer", "net/smtp kept", "go-smtp kept", "net/smtp SendMail"}
)

// all are the peers that use DATA.
func all() []string {
	var names []string
	for _, p := range peers {
		if !p.deep && p.name != "raw CHUNKING" {
			names = append(names, p.name)
		}
	}
	return names
}

// chunkers are the peers of the cells whose relay offers CHUNKING.
var chunkers = []string{"smtprelay", "smtprelay deep", "raw CHUNKING", "raw CHUNKING deep", "two round trips"}

// lone are the chunkers that differ with a single sender.
var lone = []string{"smtprelay", "raw CHUNKING", "two round trips"}

// base is the cell from which each other cell differs in one dimension.
func base(rtt int) cell {
	return cell{RTT: rtt, TLS: tlsStart, Senders: 100, Size: 10 * kilo, Reps: 1, Scale: 100, Peers: all()}
}

// matrix returns the cells. The default is a star: each dimension is varied alone, at 0 and 20 ms. The full one is the product of
// all dimensions; the quick one shows that everything works, and the order of magnitude.
func matrix(quick, full bool) []cell {
	var cells []cell
	add := func(c cell, change func(*cell)) {
		if change != nil {
			change(&c)
		}
		cells = append(cells, c)
	}
	chunking := func(c *cell) { c.Chunking, c.Peers = true, chunkers }
	switch {
	case quick:
		add(base(0), func(c *cell) { c.Scale = 20 })
		add(base(20), func(c *cell) { c.Scale = 25 })
		add(base(20), func(c *cell) { chunking(c); c.Scale = 50 })
	case full:
		for _, rtt := range []int{0, 5, 20, 50, 100} {
			for _, mode := range []tlsMode{tlsNone, tlsStart} {
				for _, senders := range []int{1, 100} {
					for _, size := range []int{kilo, 10 * kilo, mega} {
						add(base(rtt), func(c *cell) { c.TLS, c.Senders, c.Size = mode, senders, size })
					}
				}
			}
			add(base(rtt), chunking)
			add(base(rtt), func(c *cell) { chunking(c); c.Senders, c.Peers = 1, lone })
		}
	default:
		add(base(0), func(c *cell) { c.Reps = 3 })
		add(base(5), nil)
		add(base(20), func(c *cell) { c.Reps = 3 })
		add(base(50), func(c *cell) { c.Peers, c.Reps = few, 3 })
		add(base(100), func(c *cell) { c.Peers, c.Scale = lines, 50 }) // only peers that need one turn use up their connections
		for _, rtt := range []int{0, 20} {
			add(base(rtt), func(c *cell) { c.TLS, c.Peers = tlsNone, lines })
			add(base(rtt), func(c *cell) { c.Senders, c.Peers = 1, lines })
			add(base(rtt), func(c *cell) { c.Size, c.Peers = kilo, lines })
			add(base(rtt), func(c *cell) { c.Size, c.Peers = mega, lines })
		}
		for _, rtt := range []int{0, 20, 50} {
			add(base(rtt), func(c *cell) { chunking(c); c.Reps = 3 })
		}
		add(base(20), func(c *cell) { chunking(c); c.Senders, c.Peers = 1, lone })
		for _, rtt := range []int{5, 100} { // for the plot
			add(base(rtt), func(c *cell) { c.Chunking, c.Peers = true, chunkers[:4] })
		}
	}
	return cells
}

// messages returns how many messages a peer sends in the cell: as many as fill every connection, so that opening and rotation
// have their true share; fewer if each message has its own connection anyway.
func (c cell) messages(p *peer) int {
	conns := min(c.Senders, maxConns)
	n := conns * maxMessages
	switch {
	case p.each:
		n = conns * 20
	case p.oneTurn() && c.RTT > 0 && c.Senders > 1 && c.Size < mega:
		n *= 2
		if c.Chunking {
			n = n * 5 / 2 // so that it takes a measurable time
		}
	}
	switch {
	case c.Size >= mega:
		n /= 2 // half of what each connection may carry
	case c.RTT == 0:
		n *= 5
	}
	n = n * c.Scale / 100
	return max(n, conns)
}

// oneTurn reports whether the peer needs at most one turn per message.
func (p *peer) oneTurn() bool { return p.kind == ours || p.kind == limit }

// reps returns how often a peer is measured in the cell.
func (c cell) reps(p *peer) int {
	if !p.oneTurn() && (c.Chunking || c.RTT > 20 || !slices.Contains(key, p.name)) {
		return 1
	}
	return c.Reps
}

// senders returns how many goroutines send: a deep setting needs more of them to reach its depth.
func (c cell) senders(p *peer) int {
	if c.Chunking && c.Senders > 1 && p.deep {
		return maxConns * inFlightDeep * 2
	}
	return c.Senders
}

// job returns the peer's job.
func (c cell) job(p *peer) job {
	inFlight := c.InFlight
	if inFlight == 0 {
		inFlight = inFlightDefault
		if p.deep {
			inFlight = inFlightDeep
		}
	}
	return job{
		Peer: p.name, TLS: c.TLS, Senders: c.senders(p), Size: c.Size, Conns: maxConns, Rotate: maxMessages, InFlight: inFlight,
		Resume: true, Messages: c.messages(p),
	}
}

func (c cell) relay() relayConfig {
	return relayConfig{
		RTT: time.Duration(c.RTT) * time.Millisecond, TLS: c.TLS, Chunking: c.Chunking,
		MaxConns: maxConns, MaxMessages: maxMessages,
	}
}
