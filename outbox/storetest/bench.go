package storetest

import (
	"bytes"
	"context"
	"fmt"
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

// Delivered measures messages a second to a relay at 5 ms, beside the client alone: go test -run '^$' -bench . -benchtime 5000x
//
// On Linux it tells besides how long processors have worked for a message: for this process, which is the relay too, and for the servers. Where they
// are all on one machine, that is what sets the pace.
func Delivered(b *testing.B, open func(b *testing.B) outbox.Store, servers ...int) {
	servers = append(servers, os.Getpid())
	text := smtprelay.Bytes([]byte("Subject: order\r\n\r\n" + strings.Repeat("It is ready, and 4 KB long.\r\n", 140)))
	for _, chunking := range []bool{false, true} {
		alone := 0.0 // messages a second by the client
		relay := smtptest.New(b, func(s *smtptest.Server) {
			s.NoTLS, s.NoAuth, s.DropBodies, s.Chunking, s.Delay, s.MaxConns, s.MaxMessages = true, true, true, true, 5*time.Millisecond, -1, -1
		})
		client := func(b *testing.B) *smtprelay.Client {
			return relay.Client(b, func(c *smtprelay.Config) { c.Chunking, c.Limits.MaxMessagesPerConn = chunking, smtprelay.NoLimit })
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

// work is how long processors have worked for processes; 0 where nobody tells.
func work(processes []int) (d time.Duration) {
	for _, pid := range processes {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:])) // behind the name, which may have any characters
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
