//go:build unix

package storetest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/smtptest"
)

// In this file: what an outbox costs.

// Delivered measures messages a second to a relay at 5 ms, and compares with the client alone. Run it with go test -run '^$' -bench
// . -benchtime 5000x.
//
// The relay is a process of its own, as in production. On Linux the benchmark also reports the processor time for a message, of
// this process, the relay and the servers. If they are all on one machine, that sets the pace.
func Delivered(b *testing.B, open func(b *testing.B) outbox.Store, servers ...int) {
	addr, relay := startRelay(b)
	servers = append(servers, os.Getpid(), relay)
	text := smtprelay.Bytes([]byte("Subject: order\r\n\r\n" + strings.Repeat("It is ready, and 4 KB long.\r\n", 140)))
	for _, chunking := range []bool{false, true} {
		alone := 0.0 // messages a second by the client
		client := func(b *testing.B) *smtprelay.Client {
			c, err := smtprelay.New(smtprelay.Config{Addr: addr, TLS: smtprelay.TLSNone, Chunking: chunking, Limits: smtprelay.Limits{MaxMessagesPerConn: smtprelay.NoLimit}})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = c.Close() })
			return c
		}
		name := map[bool]string{false: "DATA", true: "CHUNKING"}[chunking]
		b.Run(name+"/client alone", func(b *testing.B) {
			c := client(b)
			var senders sync.WaitGroup
			next := make(chan int)
			for range InHand {
				senders.Go(func() {
					for range next {
						if _, err := c.Send(b.Context(), smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}, Body: text}); err != nil {
							b.Error(err)
						}
					}
				})
			}
			b.ResetTimer()
			worked := work(servers)
			for i := range b.N {
				next <- i
			}
			close(next)
			senders.Wait()
			alone = float64(b.N) / b.Elapsed().Seconds()
			b.ReportMetric(alone, "messages/s")
			b.ReportMetric((work(servers)-worked).Seconds()*1000/float64(b.N), "CPU-ms/message")
		})
		for intent, when := range []string{outbox.AtEnd: "at end", outbox.Early: "early"} {
			b.Run(name+"/intent "+when, func(b *testing.B) {
				store := open(b)
				defer store.Close()
				var ended sync.WaitGroup
				ended.Add(b.N)
				box, err := outbox.New(outbox.Config{Store: store, Client: client(b), InHand: InHand, Intent: outbox.IntentTime(intent), Ended: func(i outbox.Item) {
					if i.State == outbox.Accepted {
						ended.Done()
					}
				}})
				if err != nil {
					b.Fatal(err)
				}
				for _, err := range box.EnqueueAll(b.Context(), func(yield func(outbox.Message) bool) {
					for i := range b.N {
						if !yield(outbox.Message{ID: fmt.Sprint(i), From: "a@x.example", To: []string{"b@y.example"}, Body: text}) {
							return
						}
					}
				}) {
					if err != nil {
						b.Fatal(err)
					}
				}
				ctx, cancel := context.WithCancel(b.Context())
				stopped := make(chan error)
				b.ResetTimer()
				worked := work(servers)
				go func() { stopped <- box.Run(ctx) }()
				ended.Wait()
				rate := float64(b.N) / b.Elapsed().Seconds()
				b.ReportMetric(rate, "messages/s")
				b.ReportMetric((work(servers)-worked).Seconds()*1000/float64(b.N), "CPU-ms/message")
				b.ReportMetric(100*rate/alone, "%-of-the-client")
				cancel()
				if err := <-stopped; err != nil {
					b.Fatal(err)
				}
			})
		}
	}
}

// startRelay starts the relay, until b ends.
func startRelay(b *testing.B) (addr string, pid int) {
	cmd := Process("relay", "none", "")
	input, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = input.Close()
		_ = cmd.Wait() // its output, if it has failed, was seen
	})
	if _, err := fmt.Fscanln(output, &addr); err != nil {
		b.Fatal(err)
	}
	return addr, cmd.Process.Pid
}

// beRelay is the relay, until its input ends.
func beRelay() error {
	relay := smtptest.NewUnstartedServer()
	relay.NoTLS, relay.NoAuth, relay.DropBodies, relay.Chunking = true, true, true, true
	relay.Delay, relay.MaxConns, relay.MaxMessages = 5*time.Millisecond, -1, -1
	relay.Start()
	defer relay.Close()
	fmt.Println(relay.Addr())
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// work is how long processors have worked for processes; 0 where nobody tells.
func work(processes []int) (d time.Duration) {
	for _, pid := range processes {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:])) // after the name, which may have any characters
		if len(fields) < 13 {
			continue
		}
		for _, ticks := range fields[11:13] { // in the program, and in the kernel for it
			n, _ := strconv.Atoi(ticks)
			d += time.Duration(n) * 10 * time.Millisecond
		}
	}
	return d
}
