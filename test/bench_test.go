// Measurements: allocations, and benchmarks with round trips per message.
package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// sink is a relay that accepts everything at almost no cost, unlike relaytest: the client is what is measured. It counts turns:
// how often it had answered all its input, waited, and then received more.
type sink struct {
	extensions []string
	tls        *tls.Config // nil: no TLS
	turns      atomic.Int64
}

func (s *sink) dial(context.Context, string, string) (net.Conn, error) {
	near, far := netpipe.New(0)
	var client, server net.Conn = near, far
	if s.tls != nil {
		server = tls.Server(server, s.tls)
	}
	go s.serve(server) // ends with the connection
	return client, nil
}

func (s *sink) serve(conn net.Conn) {
	defer conn.Close()
	in, out := bufio.NewReaderSize(conn, 64<<10), bufio.NewWriter(conn)
	fmt.Fprintf(out, "220 sink\r\n")
	mailed := false
	for {
		if in.Buffered() == 0 {
			if out.Flush() != nil {
				return
			}
			if _, err := in.Peek(1); err != nil {
				return
			}
			s.turns.Add(1)
		}
		line, err := in.ReadSlice('\n')
		if err != nil {
			return
		}
		reply := "250 2.0.0 Ok\r\n"
		switch string(line[:4]) {
		case "EHLO":
			reply = "250-sink\r\n250-" + strings.Join(s.extensions, "\r\n250-") + "\r\n250 HELP\r\n"
		case "DATA":
			out.WriteString("354 Continue\r\n")
			out.Flush()
			for { // only the dots matter
				line, err := in.ReadSlice('\n')
				if err != nil {
					return
				}
				if string(line) == ".\r\n" {
					break
				}
			}
			s.turns.Add(1)
			reply = "250 Ok: queued as 0123456789abcdefghijkl\r\n"
		case "BDAT":
			size, _, _ := strings.Cut(string(line[5:len(line)-2]), " ")
			n, _ := strconv.Atoi(size)
			if _, err := in.Discard(n); err != nil {
				return
			}
			if reply = "250 Ok: queued as 0123456789abcdefghijkl\r\n"; !mailed {
				reply = "503 5.5.1 MAIL first\r\n"
			}
		case "MAIL":
			mailed = true
		case "QUIT":
			out.WriteString("221 Bye\r\n")
			out.Flush()
			return
		}
		out.WriteString(reply)
	}
}

func (s *sink) client(tb testing.TB, change func(*smtprelay.Config)) *smtprelay.Client {
	tb.Helper()
	cfg := smtprelay.Config{Addr: "sink.example:25", TLS: smtprelay.TLSNone, Chunking: true, LocalName: "client.example", Dial: s.dial}
	if change != nil {
		change(&cfg)
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { client.Close() })
	return client
}

var (
	overlapped = []string{"PIPELINING", "SIZE 31457280", "8BITMIME"}
	chunked    = append([]string{"CHUNKING"}, overlapped...)
)

// body is a message of about size octets, like those of mail libraries.
func body(size int) []byte {
	var b bytes.Buffer
	b.WriteString("From: a@x.example\r\nTo: b@y.example\r\nSubject: measured\r\nMessage-ID: <1@x.example>\r\n\r\n")
	for b.Len() < size {
		b.WriteString("The quick brown fox jumps over the lazy dog, and then it does so once again.\r\n")
	}
	return b.Bytes()
}

func BenchmarkSend(b *testing.B) {
	for _, relay := range []struct {
		name       string
		extensions []string
	}{{"data", overlapped}, {"chunking", chunked}} {
		for _, senders := range []int{1, 100, 1000} {
			for _, size := range []int{1 << 10, 10 << 10} {
				b.Run(fmt.Sprintf("%s/senders=%d/size=%d", relay.name, senders, size), func(b *testing.B) {
					s := &sink{extensions: relay.extensions}
					c := s.client(b, nil)
					m := smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}, Body: smtprelay.Bytes(body(size))}
					b.SetBytes(int64(size))
					b.ReportAllocs()
					sendAll(b, c, m, senders, b.N)
					b.ReportMetric(float64(s.turns.Load())/float64(b.N), "turns/msg")
				})
			}
		}
	}
}

// sendAll sends m n times from the given number of goroutines.
func sendAll(tb testing.TB, c *smtprelay.Client, m smtprelay.Message, senders, n int) {
	ctx, cancel := context.WithCancel(context.Background()) // as in services, where it belongs to a request
	defer cancel()
	var left atomic.Int64
	left.Store(int64(n))
	var wg sync.WaitGroup
	for range senders {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if _, err := c.Send(ctx, m); err != nil {
					tb.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// BenchmarkSendBody writes one large body.
func BenchmarkSendBody(b *testing.B) {
	for name, extensions := range map[string][]string{"data": overlapped, "chunking": chunked} {
		b.Run(name, func(b *testing.B) {
			c := (&sink{extensions: extensions}).client(b, nil)
			text := body(1 << 20)
			b.SetBytes(int64(len(text)))
			b.ReportAllocs()
			for b.Loop() {
				m := smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}, Body: smtprelay.Bytes(text)}
				if _, err := c.Send(context.Background(), m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestAllocationsPerMessage(t *testing.T) {
	const (
		messages = 5000
		objects  = 10      // at most
		octets   = 1 << 10 // at most
	)
	for name, extensions := range map[string][]string{"data": overlapped, "chunking": chunked} {
		t.Run(name, func(t *testing.T) {
			c := (&sink{extensions: extensions}).client(t, func(cfg *smtprelay.Config) { cfg.Limits.MaxMessagesPerConn = -1 })
			m := smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}, Body: smtprelay.Bytes(body(10 << 10))}
			sendAll(t, c, m, 100, 1000)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			sendAll(t, c, m, 100, messages)
			runtime.ReadMemStats(&after)
			gotObjects := float64(after.Mallocs-before.Mallocs) / messages
			gotOctets := float64(after.TotalAlloc-before.TotalAlloc) / messages
			t.Logf("%.1f allocations, %.0f octets per message, including the relay's", gotObjects, gotOctets)
			if gotObjects > objects || gotOctets > octets {
				t.Errorf("%.1f allocations, %.0f octets per message, want at most %d and %d", gotObjects, gotOctets, objects, octets)
			}
		})
	}
}

// BenchmarkSendBodyInPieces writes one large body in pieces, down to single octets, in the clear and over TLS.
func BenchmarkSendBodyInPieces(b *testing.B) {
	text := body(1 << 20)
	web := httptest.NewTLSServer(nil) // for its certificate
	b.Cleanup(web.Close)
	for _, way := range []struct {
		name       string
		extensions []string
		tls        *tls.Config
	}{{"data", overlapped, nil}, {"chunking", chunked, nil}, {"data-tls", overlapped, web.TLS}, {"chunking-tls", chunked, web.TLS}} {
		for _, size := range []int{len(text), 76, 1} {
			b.Run(fmt.Sprintf("%s/octets=%d", way.name, size), func(b *testing.B) {
				c := (&sink{extensions: way.extensions, tls: way.tls}).client(b, func(cfg *smtprelay.Config) {
					if way.tls != nil {
						cfg.Addr, cfg.TLS, cfg.TLSConfig = "example.com:465", smtprelay.TLSImplicit, web.Client().Transport.(*http.Transport).TLSClientConfig
					}
				})
				b.SetBytes(int64(len(text)))
				b.ReportAllocs()
				for b.Loop() {
					m := smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}, Body: pieces{text, size}}
					if _, err := c.Send(context.Background(), m); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// listen returns the address of the sink on loopback.
func (s *sink) listen(tb testing.TB) string {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.Close() })
	go func() { // ends when l is closed
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go s.serve(conn) // ends with the connection
		}
	}()
	return l.Addr().String()
}

// BenchmarkConns shows whether a message costs more with more connections: with as many senders as connections, and with 100
// senders on that many open connections. The figure is the processor time, including the relay's; connections are opened before
// the measurement. Over loopback each connection needs two files.
func BenchmarkConns(b *testing.B) {
	for _, way := range []string{"memory", "loopback"} {
		for _, everybody := range []bool{true, false} {
			for _, conns := range []int{10, 100, 1000, 10000} {
				name := fmt.Sprintf("%s/senders=%d/conns=%d", way, 100, conns)
				senders := min(100, conns)
				if everybody {
					name, senders = fmt.Sprintf("%s/senders=conns/conns=%d", way, conns), conns
				}
				b.Run(name, func(b *testing.B) {
					s := &sink{extensions: overlapped}
					c := s.client(b, func(cfg *smtprelay.Config) {
						cfg.Limits.MaxConns, cfg.Limits.MaxMessagesPerConn = conns, smtprelay.NoLimit
						cfg.Limits.MaxIdleTime, cfg.Limits.MaxConnAge = smtprelay.NoLimit, smtprelay.NoLimit
						if way == "loopback" {
							cfg.Dial, cfg.Addr = nil, s.listen(b)
						}
					})
					m := smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}, Body: smtprelay.Bytes(body(1 << 10))}
					openAll(b, c, m, conns)
					runtime.GC()
					b.ResetTimer()
					began := processorTime()
					sendAll(b, c, m, senders, b.N)
					b.ReportMetric(float64(processorTime()-began)/float64(b.N)/1000, "cpu-µs/msg")
				})
			}
		}
	}
}

// openAll makes c open conns connections: each carries a message whose body waits for the others.
func openAll(tb testing.TB, c *smtprelay.Client, m smtprelay.Message, conns int) {
	tb.Helper()
	var begun, sent sync.WaitGroup
	begun.Add(conns)
	for range conns {
		sent.Go(func() {
			m := m
			m.Body = meeting{m.Body, &begun}
			if _, err := c.Send(context.Background(), m); err != nil {
				tb.Error(err)
			}
		})
	}
	sent.Wait()
	if open := c.Stats().OpenConns; open != conns {
		tb.Fatalf("%d connections open, want %d", open, conns)
	}
}

// meeting is a body that waits until all bodies have begun.
type meeting struct {
	io.WriterTo
	begun *sync.WaitGroup
}

func (m meeting) WriteTo(w io.Writer) (int64, error) {
	m.begun.Done()
	m.begun.Wait()
	return m.WriterTo.WriteTo(w)
}
