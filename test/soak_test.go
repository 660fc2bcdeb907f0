// The long run: nothing lost, nothing twice, constant memory and number of goroutines.
package test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
)

var soakMessages = flag.Int("soak.messages", fewer(20_000), "messages of TestSoak")

// soakRelay is a relay on loopback that fails one message in a hundred, in one of several ways, and keeps a ledger of fixed size:
// how often it has accepted each message. Every second connection offers CHUNKING.
type soakRelay struct {
	listener net.Listener
	taken    []atomic.Uint32 // by the number of the message
	conns    atomic.Int64
	open     atomic.Int64
	most     atomic.Int64
	faults   atomic.Int64
	chunked  atomic.Int64 // messages accepted in chunks
	serving  sync.WaitGroup
}

const soakIdle = 100 * time.Millisecond // after which the relay closes an idle connection

func (r *soakRelay) run() {
	for {
		conn, err := r.listener.Accept()
		if err != nil {
			return
		}
		n := r.conns.Add(1)
		open := r.open.Add(1)
		for most := r.most.Load(); open > most && !r.most.CompareAndSwap(most, open); most = r.most.Load() {
		}
		r.serving.Go(func() {
			c := &soakConn{Conn: conn, r: r, chance: rand.New(rand.NewPCG(uint64(n), 0))}
			(&relaytest.Relay{Answer: c.answer, Body: &c.text}).Serve(c, int(n))
		})
	}
}

// soakConn is one connection of a soakRelay.
type soakConn struct {
	net.Conn
	r      *soakRelay
	chance *rand.Rand
	within bool         // a transaction is open
	inBody bool         // DATA's
	fault  string       // of its message: "", or the step at which it strikes
	text   bytes.Buffer // the part of its body that has arrived
}

// Read closes an idle connection.
func (c *soakConn) Read(p []byte) (int, error) {
	var limit time.Time
	if !c.inBody {
		limit = time.Now().Add(soakIdle)
	}
	c.SetReadDeadline(limit)
	n, err := c.Conn.Read(p)
	if err != nil && !c.inBody {
		io.WriteString(c, "421 4.4.2 idle\r\n")
	}
	return n, err
}

// Close counts the connection as closed before the client can see it.
func (c *soakConn) Close() error {
	c.r.open.Add(-1)
	return c.Conn.Close()
}

// strikes reports whether the message's fault strikes here.
func (c *soakConn) strikes(at string) bool {
	if c.fault != at {
		return false
	}
	c.r.faults.Add(1)
	return true
}

func (c *soakConn) answer(n int, line string) string {
	verb, _, _ := strings.Cut(line, " ")
	switch verb {
	case "EHLO":
		if n%2 == 0 {
			return "250-soak\n250-PIPELINING\n250-CHUNKING\n250 SIZE 1000000"
		}
		return "250-soak\n250-PIPELINING\n250 SIZE 1000000"
	case "RSET":
		c.within = false
	case "MAIL":
		c.within, c.fault = true, ""
		c.text.Reset()
		if c.chance.IntN(100) == 0 {
			all := []string{"mail", "421", "rcpt", "data", "body", "before", "after", "451", "250"}
			c.fault = all[c.chance.IntN(len(all))]
		}
		if c.strikes("mail") {
			return relaytest.Hangup
		}
		if c.strikes("421") {
			return "421 4.3.2 not now" + relaytest.Hangup
		}
	case "RCPT":
		if c.strikes("rcpt") {
			return "550 5.1.1 nobody"
		}
	case "DATA":
		if c.fault == "rcpt" {
			return "554 5.5.1 no valid recipients"
		}
		if c.strikes("data") {
			return relaytest.Hangup
		}
		c.inBody = true
		return "354 go on"
	case "BDAT":
		switch {
		case !c.within:
			return "503 5.5.1 MAIL first"
		case c.fault == "rcpt":
			return "554 5.5.1 no valid recipients"
		case c.fault == "body":
			return c.end()
		case strings.HasSuffix(line, " LAST"):
			c.r.chunked.Add(1)
			return c.end()
		}
	case ".":
		return c.end()
	}
	return relaytest.Agree("", line)
}

// end replies to the end of a body, and updates the ledger.
func (c *soakConn) end() string {
	c.within, c.inBody = false, false
	if c.strikes("body") || c.strikes("before") {
		return relaytest.Hangup
	}
	if c.strikes("451") {
		return "451 4.3.0 later"
	}
	first, _, _ := strings.Cut(c.text.String(), "\r\n")
	number, err := strconv.Atoi(strings.TrimPrefix(first, "Message-ID: "))
	if err != nil {
		return "554 5.6.0 " + err.Error()
	}
	c.r.taken[number].Add(1)
	if c.strikes("after") {
		return relaytest.Hangup
	}
	reply := "250 2.0.0 Ok: queued as " + strconv.Itoa(number)
	if c.strikes("250") { // as some relays do, without a word
		return reply + relaytest.Hangup
	}
	return reply
}

// A long run: nothing is lost or sent twice, and neither memory nor goroutines grow. The default is short.
func TestSoak(t *testing.T) {
	const senders, parts = 100, 10
	goroutines := runtime.NumGoroutine()
	total := *soakMessages
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	relay := &soakRelay{listener: listener, taken: make([]atomic.Uint32, total)}
	relay.serving.Go(relay.run)
	client, err := smtprelay.New(smtprelay.Config{
		Addr:     listener.Addr().String(),
		TLS:      smtprelay.TLSNone,
		Chunking: true,
		Retry:    smtprelay.Retry{MinBackoff: time.Millisecond, MaxBackoff: 10 * time.Millisecond},
	})
	if err != nil {
		t.Fatal(err)
	}
	told := make([]smtprelay.Outcome, total)
	filler := strings.Repeat("The quick brown fox jumps over the lazy dog.\r\n", 20)
	var heaps []uint64
	var running []int
	for part := range parts {
		var next atomic.Int64
		next.Store(int64(part * total / parts))
		end := int64((part + 1) * total / parts)
		var sending sync.WaitGroup
		for range senders {
			sending.Go(func() {
				for n := next.Add(1) - 1; n < end; n = next.Add(1) - 1 {
					_, err := client.Send(context.Background(), smtprelay.Message{
						From: "a@x.example",
						To:   []string{"b@y.example"},
						Body: smtprelay.Bytes(fmt.Appendf(nil, "Message-ID: %d\r\nSubject: soak\r\n\r\n%s", n, filler)),
					})
					told[n] = smtprelay.Accepted
					if err != nil {
						e, ok := errors.AsType[*smtprelay.Error](err)
						if !ok {
							t.Errorf("message %d: %v is not an *Error", n, err)
							return
						}
						told[n] = e.Outcome
					}
				}
			})
		}
		sending.Wait()
		awaitNoneOpen(relay, client) // the relay closes idle connections
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		heaps = append(heaps, m.HeapAlloc)
		running = append(running, runtime.NumGoroutine())
	}
	stats := client.Stats()
	client.Close()
	listener.Close()
	relay.serving.Wait()

	var lost, twice, accepted, unknown int
	for n := range told {
		copies := relay.taken[n].Load()
		switch {
		case copies > 1:
			twice++
		case told[n] == smtprelay.Accepted && copies == 0:
			lost++
		case told[n] == smtprelay.NotAccepted && copies == 1:
			t.Errorf("message %d: reported as not accepted, but accepted", n)
		}
		switch told[n] {
		case smtprelay.Accepted:
			accepted++
		case smtprelay.Unknown:
			unknown++
		}
	}
	t.Logf("%d messages: %d accepted, %d unknown, %d not accepted; %d lost, %d twice", total, accepted, unknown, total-accepted-unknown, lost, twice)
	t.Logf("%d connections, %d open at most, %d messages in chunks, %d faults, %d retries, %d overlapped", relay.conns.Load(), relay.most.Load(), relay.chunked.Load(), relay.faults.Load(), stats.Retries, stats.Overlapped)
	t.Logf("live heap after each tenth: %d octets", heaps)
	t.Logf("goroutines after each tenth: %d", running)
	if lost > 0 || twice > 0 {
		t.Errorf("%d messages lost, %d sent twice", lost, twice)
	}
	if relay.most.Load() > 10 {
		t.Errorf("%d connections open at once, want at most 10", relay.most.Load())
	}
	if relay.faults.Load() == 0 {
		t.Error("no fault struck")
	}
	if relay.chunked.Load() == 0 {
		t.Error("no message was sent in chunks")
	}
	if first, last := heaps[0], heaps[parts-1]; last > first+1<<20 {
		t.Errorf("the live heap has grown from %d to %d octets", first, last)
	}
	if running[parts-1] > running[0] {
		t.Errorf("goroutines after each tenth: %d", running)
	}
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > goroutines && time.Now().Before(deadline); {
		runtime.Gosched()
	}
	if n := runtime.NumGoroutine(); n > goroutines {
		t.Errorf("%d goroutines at the end, %d at the start", n, goroutines)
	}
}

// awaitNoneOpen waits until the relay has closed all connections and the client has noticed.
func awaitNoneOpen(relay *soakRelay, client *smtprelay.Client) {
	for relay.open.Load() > 0 || client.Stats().OpenConns > 0 {
		runtime.Gosched()
	}
}
