package smtptest_test

import (
	"bytes"
	"context"
	"testing"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// BenchmarkServer measures the relay's throughput with this module's client.
func BenchmarkServer(b *testing.B) {
	s := smtptest.NewUnstartedServer()
	s.DropBodies = true
	s.MaxMessages = -1
	s.Start()
	defer s.Close()
	cfg := s.Config()
	cfg.Limits.MaxMessagesPerConn = -1
	client, err := smtprelay.New(cfg)
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	m := smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}}
	m.Body = smtprelay.Bytes(bytes.Repeat([]byte("0123456789012345678901234567890123456789012345678901234567890123456789012345\r\n"), 10<<10/78))
	b.ReportAllocs()
	b.SetParallelism(10)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := client.Send(context.Background(), m); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
	b.ReportMetric(float64(s.Stats().MessageTurns)/float64(b.N), "rtt/msg")
}
