package smtprelay_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A nameserver answers each question for an IPv4 address with all of its addresses, in their order, and knows no others. It
// speaks DNS over a stream (RFC 1035, 4.2.2).
type nameserver struct {
	addresses []string
	asked     atomic.Int64
}

// resolver asks nobody but the nameserver.
func (ns *nameserver) resolver() *net.Resolver {
	return &net.Resolver{
		PreferGo: true,
		Dial: func(context.Context, string, string) (net.Conn, error) {
			client, server := net.Pipe()
			go ns.serve(server) // ends when the client closes
			return client, nil
		},
	}
}

func (ns *nameserver) serve(conn net.Conn) {
	defer conn.Close()
	for {
		var size [2]byte
		if _, err := io.ReadFull(conn, size[:]); err != nil {
			return
		}
		query := make([]byte, binary.BigEndian.Uint16(size[:]))
		if _, err := io.ReadFull(conn, query); err != nil {
			return
		}
		answer := ns.answer(query)
		binary.BigEndian.PutUint16(size[:], uint16(len(answer)))
		if _, err := conn.Write(append(size[:], answer...)); err != nil {
			return
		}
	}
}

// answer is the reply to a query with one question (RFC 1035, 4.1).
func (ns *nameserver) answer(query []byte) []byte {
	const header, typeA, ttl = 12, 1, 60
	end := header + bytes.IndexByte(query[header:], 0) + 1 // of the name
	question := query[header : end+4]                      // with type and class
	count := 0
	if binary.BigEndian.Uint16(query[end:]) == typeA {
		ns.asked.Add(1)
		count = len(ns.addresses)
	}
	a := append([]byte{}, query[:2]...)                         // the number of the query
	a = append(a, 0x81, 0x80, 0, 1, 0, byte(count), 0, 0, 0, 0) // a response without error: one question, so many answers
	a = append(a, question...)
	for _, addr := range ns.addresses[:count] {
		a = append(a, 0xc0, header) // the name in the question
		a = append(a, 0, typeA, 0, 1, 0, 0, 0, ttl, 0, net.IPv4len)
		a = append(a, net.ParseIP(addr).To4()...)
	}
	return a
}

// A name with several addresses, of which the first ones are dead: whoever dials passes them over, and nobody is told.
func TestDeadAddressesOfANameArePassedOver(t *testing.T) {
	relay := newRelay(t, func(s *smtptest.Server) { s.CertNames = []string{"relay.test"} })
	_, port, err := net.SplitHostPort(relay.Addr())
	if err != nil {
		t.Fatal(err)
	}
	ns := &nameserver{addresses: []string{"127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.1"}}
	dialer := net.Dialer{Resolver: ns.resolver()}
	cfg := configOf(relay)
	cfg.Addr = net.JoinHostPort("relay.test", port)
	cfg.Retry.MaxAttempts = 1
	cfg.Dial = dialer.DialContext
	client := newClient(t, cfg)
	allAccepted(t, relay, sendAtOnce(t.Context(), client, 0, 50))
	want(t, "Stats().DialErrors", int(client.Stats().DialErrors), 0)
	if ns.asked.Load() == 0 {
		t.Error("the nameserver was never asked")
	}

	// With nobody at any of them, the error names the relay and says what to look at.
	dead := nameserver{addresses: ns.addresses[:3]}
	dialer.Resolver = dead.resolver()
	cfg.Dial = dialer.DialContext
	s := sendOne(t.Context(), newClient(t, cfg), 100)
	for _, words := range []string{"dial relay.test:" + port, "check host and port"} {
		if !contains(s.err, words) {
			t.Errorf("%v; want it to say %q", s.err, words)
		}
	}
	if e := failure(s.err); e.Attempts != 1 || e.Outcome != smtprelay.NotAccepted || !e.Temporary() {
		t.Errorf("%v, %d attempts; want one, not accepted, temporary", s.err, e.Attempts)
	}
}
