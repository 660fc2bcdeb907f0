// Here belongs the long run: nothing lost, nothing twice, memory and goroutines flat.
package test

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
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
)

var soakMessages = flag.Int("soak.messages", 20_000, "messages of TestSoak")

// soakRelay is a relay on loopback that fails one message in a hundred, each in one of several ways, and keeps a ledger of
// fixed size: how often it has taken each message. Every second connection offers CHUNKING.
type soakRelay struct {
	listener net.Listener
	taken    []atomic.Uint32 // by the number of the message
	conns    atomic.Int64
	open     atomic.Int64
	most     atomic.Int64
	faults   atomic.Int64
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
			r.serve(conn, n)
			r.open.Add(-1)
			conn.Close()
		})
	}
}

func (r *soakRelay) serve(conn net.Conn, n int64) {
	in, out := bufio.NewReaderSize(conn, 16<<10), bufio.NewWriter(conn)
	chance := rand.New(rand.NewPCG(uint64(n), 0))
	// The fault of the message under way: none, or where it strikes.
	fault := ""
	strikes := func(at string) bool {
		if fault != at {
			return false
		}
		r.faults.Add(1)
		return true
	}
	fmt.Fprint(out, "220 soak\r\n")
	for {
		if in.Buffered() == 0 {
			out.Flush()
			conn.SetReadDeadline(time.Now().Add(soakIdle))
		}
		line, err := in.ReadString('\n')
		if err != nil {
			out.WriteString("421 4.4.2 idle\r\n")
			out.Flush()
			return
		}
		conn.SetReadDeadline(time.Time{})
		verb, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		reply := "250 2.0.0 Ok\r\n"
		switch verb {
		case "EHLO":
			reply = "250-soak\r\n250-PIPELINING\r\n250 SIZE 1000000\r\n"
			if n%2 == 0 {
				reply = "250-soak\r\n250-PIPELINING\r\n250-CHUNKING\r\n250 SIZE 1000000\r\n"
			}
		case "MAIL":
			fault = ""
			if chance.IntN(100) == 0 {
				all := []string{"mail", "421", "rcpt", "data", "body", "before", "after", "451", "250"}
				fault = all[chance.IntN(len(all))]
			}
			if strikes("mail") {
				return
			}
			if strikes("421") {
				out.WriteString("421 4.3.2 not now\r\n")
				out.Flush()
				return
			}
		case "RCPT":
			if strikes("rcpt") {
				reply = "550 5.1.1 nobody\r\n"
			}
		case "DATA", "BDAT":
			if verb == "DATA" {
				if fault == "rcpt" {
					out.WriteString("554 5.5.1 no valid recipients\r\n")
					continue
				}
				if strikes("data") {
					return
				}
				out.WriteString("354 go on\r\n")
				out.Flush()
			}
			number, whole := r.body(in, line)
			if !whole || strikes("body") || strikes("before") {
				return
			}
			switch {
			case fault == "rcpt":
				reply = "554 5.5.1 no valid recipients\r\n"
			case strikes("451"):
				reply = "451 4.3.0 later\r\n"
			default:
				r.taken[number].Add(1)
				if strikes("after") {
					return
				}
				reply = "250 2.0.0 Ok: queued as " + strconv.Itoa(number) + "\r\n"
				if strikes("250") { // as some relays do, with nothing said of it
					out.WriteString(reply)
					out.Flush()
					return
				}
			}
		case "QUIT":
			out.WriteString("221 Bye\r\n")
			out.Flush()
			return
		}
		out.WriteString(reply)
	}
}

// body reads a body, or the chunk that line announces, and tells which message it is.
func (r *soakRelay) body(in *bufio.Reader, line string) (number int, whole bool) {
	left := -1
	if size, ok := strings.CutPrefix(line, "BDAT "); ok {
		size, _, _ = strings.Cut(size, " ")
		left, _ = strconv.Atoi(size)
	}
	for first := true; left != 0; first = false {
		text, err := in.ReadString('\n')
		if err != nil {
			return 0, false
		}
		if left > 0 {
			left -= len(text)
		} else if text == ".\r\n" {
			break
		}
		if first {
			number, _ = strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(text, "Message-ID: ")))
		}
	}
	return number, true
}

// A long run: nothing is lost or sent twice, and neither memory nor goroutines grow. By default it is a short one.
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
		Addr:  listener.Addr().String(),
		TLS:   smtprelay.TLSNone,
		Retry: smtprelay.Retry{MinBackoff: time.Millisecond, MaxBackoff: 10 * time.Millisecond},
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
							t.Errorf("message %d: %v is no *Error", n, err)
							return
						}
						told[n] = e.Outcome
					}
				}
			})
		}
		sending.Wait()
		awaitNoneOpen(relay, client) // the relay closes what is idle
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
			t.Errorf("message %d: told as not accepted, and taken", n)
		}
		switch told[n] {
		case smtprelay.Accepted:
			accepted++
		case smtprelay.Unknown:
			unknown++
		}
	}
	t.Logf("%d messages: %d accepted, %d unknown, %d not accepted; %d lost, %d twice", total, accepted, unknown, total-accepted-unknown, lost, twice)
	t.Logf("%d connections, %d open at most, %d faults, %d retries, %d overlapped", relay.conns.Load(), relay.most.Load(), relay.faults.Load(), stats.Retries, stats.Overlapped)
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

// awaitNoneOpen returns when the relay has closed all connections and the client has noticed.
func awaitNoneOpen(relay *soakRelay, client *smtprelay.Client) {
	for relay.open.Load() > 0 || client.Stats().OpenConns > 0 {
		runtime.Gosched()
	}
}
