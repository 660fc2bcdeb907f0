// Measurements beside the matrix: opening a connection, steadiness, large bodies, many waiting Sends.

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/knadh/smtppool/v2"

	"github.com/smtprelay/smtprelay"
)

// opening is how many turns a peer needs from the dial to its first receipt.
type opening struct {
	Peer    string  `json:"peer"`
	TLS     tlsMode `json:"tls"`
	TLS12   bool    `json:"tls12"`
	Fresh   int     `json:"fresh"`   // turns with a full TLS handshake
	Resumed int     `json:"resumed"` // turns with a resumed session; 0: the peer does not resume
	Err     string  `json:"err,omitempty"`
}

// openings has each peer send two messages, each on a new connection: the second may resume the first's session.
func (d *driver) openings(progress func(string)) []opening {
	var all []opening
	for _, mode := range []tlsMode{tlsNone, tlsImplicit, tlsStart} {
		for _, tls12 := range []bool{false, true} {
			if tls12 && mode == tlsNone {
				continue
			}
			for _, name := range []string{"smtprelay", "raw DATA", "mox", "go-mail DialAndSend", "nodemailer"} {
				progress("opening: " + name)
				p := peerNamed(name)
				j := job{
					Peer: name, TLS: mode, Senders: 1, Size: kilo, Conns: 1, Rotate: 1, InFlight: 1, Resume: true, Messages: 2,
					Cold: true,
				}
				cfg := relayConfig{RTT: 20 * time.Millisecond, TLS: mode, TLS12: tls12, MaxConns: maxConns, MaxMessages: maxMessages}
				o := d.run(p, cfg, j)
				all = append(all, opening{
					Peer: name, TLS: mode, TLS12: tls12, Err: o.Err,
					Fresh: o.Relay.medianTurns(false), Resumed: o.Relay.medianTurns(true),
				})
			}
		}
	}
	return all
}

// steadiness is how evenly the relay accepted the messages of a long run, per tenth of a second, without the first and the last
// tenth, which are incomplete.
type steadiness struct {
	Peer             string `json:"peer"`
	Messages         int    `json:"messages"`
	Min, Median, Max int
	Later            int     `json:"later"` // the minimum once all connections were replaced twice
	Rate             float64 `json:"rate"`  // messages a second
	Slices           []int   `json:"slices"`
	Err              string  `json:"err,omitempty"`
}

func (d *driver) steadiness(progress func(string)) []steadiness {
	var all []steadiness
	for _, name := range []string{"smtprelay", "raw DATA", "nodemailer"} {
		progress("steadiness: " + name)
		c := base(20)
		j := c.job(peerNamed(name))
		j.Messages = 5000
		o := d.run(peerNamed(name), c.relay(), j)
		s := steadiness{Peer: name, Messages: o.Client.Sent, Rate: o.rate(), Slices: o.Relay.Slices, Err: o.Err}
		if n := len(s.Slices); n > 2 {
			inner := slices.Sorted(slices.Values(s.Slices[1 : n-1]))
			s.Min, s.Median, s.Max = inner[0], inner[len(inner)/2], inner[len(inner)-1]
			s.Later = s.Max
			accepted := 0
			for _, slice := range s.Slices[:n-1] {
				if accepted > 5*maxConns*maxMessages/2 {
					s.Later = min(s.Later, slice)
				}
				accepted += slice
			}
		}
		all = append(all, s)
	}
	return all
}

// large has the peers that can write a body in pieces send messages of 25 MB.
func (d *driver) large(progress func(string)) []outcome {
	var all []outcome
	for _, name := range []string{"smtprelay", "net/smtp kept", "go-smtp kept", "go-mail kept", "gomail kept", "nodemailer"} {
		progress("25 MB: " + name)
		c := base(0)
		j := c.job(peerNamed(name))
		j.Size, j.Stream, j.Senders, j.Messages = 25*mega, true, 1, 4
		all = append(all, d.run(peerNamed(name), c.relay(), j))
	}
	return all
}

// waiting is the memory of a Send that waits for a connection, including the caller's goroutine or promise.
type waiting struct {
	Peer   string `json:"peer"`
	Octets int64  `json:"octets"`
	Err    string `json:"err,omitempty"`
}

const waiters = 10_000

func (d *driver) waiting(progress func(string)) []waiting {
	var all []waiting
	for _, name := range []string{"goroutine", "smtprelay", "smtppool", "nodemailer"} {
		progress("waiting: " + name)
		w := waiting{Peer: name}
		p := &peer{name: name, run: runSmtprelay} // anything but nil: the program itself
		if name == "nodemailer" {
			p.run = nil
		}
		switch addr, err := d.relay.open(relayConfig{TLS: tlsNone, Hold: true, MaxConns: maxConns, MaxMessages: maxMessages}); {
		case err != nil:
			w.Err = err.Error()
		case p.run == nil && d.node == "":
			w.Err = d.noNode
		default:
			j := job{Peer: name, TLS: tlsNone, Size: 10 * kilo, Conns: maxConns, Rotate: maxMessages, Waiters: waiters}
			j.Host, j.Port = hostPort(addr)
			var told struct{ Waiter int64 }
			if err := d.child(p, more{job: j}, &told); err != nil {
				w.Err = err.Error()
			}
			w.Octets = told.Waiter
			d.relay.close(addr)
		}
		all = append(all, w)
	}
	return all
}

// waitersMain is the peer's process for that: it fills the connections of a relay that answers no final dot, and measures the
// memory of the Sends that wait for them. It ends without closing anything.
func waitersMain(j job, out io.Writer) error {
	message := newMessage(j.Size)
	var send func()
	switch j.Peer {
	case "goroutine":
		never := make(chan struct{})
		send = func() { <-never }
	case "smtprelay":
		client, err := smtprelay.New(smtprelayConfig(j))
		if err != nil {
			return err
		}
		send = func() {
			client.Send(context.Background(), smtprelay.Message{From: sender, To: []string{recipient}, Body: smtprelay.Bytes(message)})
		}
	case "smtppool":
		pool, err := smtppool.New(smtppool.Opt{
			Host: j.Host, Port: j.Port, HelloHostname: hello, MaxConns: j.Conns, PoolWaitTimeout: time.Minute, Auth: netSMTPAuth(j),
		})
		if err != nil {
			return err
		}
		body := bodyText(j)
		send = func() { pool.Send(smtppool.Email{From: sender, To: []string{recipient}, Text: body}) }
	default:
		return fmt.Errorf("%q has no waiters", j.Peer)
	}
	// Twice as many as connections, since a peer may send a second message after the first.
	for range 2 * j.Conns {
		go send() // ends with the process, like those below
	}
	time.Sleep(time.Second)
	before := heldOctets()
	for range j.Waiters {
		go send()
	}
	time.Sleep(2 * time.Second)
	held := (heldOctets() - before) / int64(j.Waiters)
	return json.NewEncoder(out).Encode(struct {
		Waiter int64 `json:"waiter"`
	}{held})
}
