package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/smtprelay/smtprelay"
)

// checkLimit is how long a check may take. The slowest, on the slowest relay, wait for several seconds of idleness.
const checkLimit = 90 * time.Second

// A verdict is one field of the table.
type verdict struct {
	relay, check string
	mode         string // byData or inChunks; empty where it is the same
	state        string // "ok", "FAIL" or "n.a."
	reason       string // of the other two
	dialogue     string
}

// runSuite runs the checks on each relay in turn and prints what came of it. It is the first process of its namespace: when it
// returns, everything that it has started is killed.
func runSuite(in []byte) error {
	var order suiteOrder
	if err := json.Unmarshal(in, &order); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	if err := syscall.Sethostname([]byte("client")); err != nil {
		return err
	}
	box, err := newBox(order.Dir)
	if err != nil {
		return err
	}
	certs, err := newCertificates()
	if err != nil {
		return err
	}
	var verdicts []verdict
	var columns []fetched
	for _, f := range order.Relays {
		if f.Missing != "" {
			continue
		}
		columns = append(columns, f)
		rel := relays[slices.IndexFunc(relays, func(r relay) bool { return r.name == f.Name })]
		verdicts = append(verdicts, onRelay(box, f, rel, certs, order)...)
	}
	printTable(os.Stdout, columns, verdicts)
	for _, f := range order.Relays {
		if f.Missing != "" {
			fmt.Printf("%s was not run, since it could not be had: %s\n", f.Name, firstLine(f.Missing))
		}
	}
	if slices.ContainsFunc(verdicts, func(v verdict) bool { return v.state == "FAIL" }) {
		return errors.New("some checks failed")
	}
	return nil
}

// onRelay runs the checks on one relay.
func onRelay(box *box, f fetched, rel relay, certs *certificates, order suiteOrder) []verdict {
	fmt.Printf("\n%s %s\n", f.Name, f.Version)
	r, err := install(box, f, rel, certs)
	if err == nil {
		err = r.start()
	}
	if err != nil {
		fmt.Printf("  FAIL it does not run: %v\n", err)
		return []verdict{{relay: f.Name, check: "start", state: "FAIL", reason: err.Error()}}
	}
	defer r.stop()
	verdicts := []verdict{{relay: f.Name, check: "start", state: "ok"}}
	if r.habit, err = askAboutChunks(r); err != nil {
		return append(verdicts, verdict{relay: f.Name, check: "start", state: "FAIL", reason: "asked about chunks: " + err.Error()})
	}
	fmt.Printf("  a chunk out of order, RSET: %s\n", r.habit)
	if order.Speed {
		return append(verdicts, speeds(r, f.Name)...)
	}
	var benches []*bench
	for _, mode := range []string{byData, inChunks} {
		due := checks
		if mode == inChunks {
			if !r.habit.offers {
				break
			}
			due = slices.Concat(checks, chunkChecks)
		}
		for _, c := range due {
			if !strings.Contains(c.name, order.Check) || rel.onlyChecks != nil && !slices.Contains(rel.onlyChecks, c.name) {
				continue
			}
			began := time.Now()
			b, v := runCheck(r, c, mode, certs)
			benches = append(benches, b)
			verdicts = append(verdicts, v)
			fmt.Printf("  %-4s %-6s  %-26s %6.1f s  %s\n", v.state, mode, v.check, time.Since(began).Seconds(), indent(v.reason))
			if v.dialogue != "" && (order.Verbose || v.state == "FAIL") {
				fmt.Printf("       the dialogue:\n       %s\n", indent(shorten(v.dialogue, order.Verbose)))
			}
		}
	}
	verdicts = append(verdicts, lastLook(f.Name, benches))
	return verdicts
}

// lastLook compares once more at the end: a relay that queues late what it was sent before a break would be caught here.
func lastLook(name string, benches []*bench) verdict {
	v := verdict{relay: name, check: "ledger at the end", state: "ok"}
	var errs []error
	for _, b := range benches {
		if err := b.audit(); err != nil {
			errs = append(errs, err)
		}
	}
	if err := first(errs); err != nil {
		v.state, v.reason = "FAIL", err.Error()
		fmt.Printf("  FAIL %s: %s\n", v.check, indent(v.reason))
	}
	return v
}

func runCheck(r *running, c check, mode string, certs *certificates) (*bench, verdict) {
	ctx, cancel := context.WithTimeout(context.Background(), checkLimit)
	defer cancel()
	b := &bench{running: r, ctx: ctx, certs: certs, check: c.name, mode: mode, closed: make(chan smtprelay.ConnClosedInfo, 1)}
	result := make(chan error, 1)
	go func() { // until the check is over; one that hangs is left behind, to end with the program
		defer func() {
			if p := recover(); p != nil {
				result <- fmt.Errorf("panic: %v\n%s", p, debug.Stack())
			}
		}()
		result <- errors.Join(c.run(b), b.finish())
	}()
	var err error
	select {
	case err = <-result:
	case <-time.After(checkLimit + 30*time.Second):
		buf := make([]byte, 1<<20)
		err = fmt.Errorf("it hangs:\n%s", buf[:runtime.Stack(buf, true)])
	}
	v := verdict{relay: r.name, check: c.name, mode: mode, state: "ok", dialogue: b.dialogue.String()}
	if na, ok := errors.AsType[notApplicable](err); ok {
		v.state, v.reason = "n.a.", string(na)
	} else if err != nil {
		v.state, v.reason = "FAIL", err.Error()
	}
	return b, v
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

func indent(s string) string { return strings.ReplaceAll(s, "\n", "\n       ") }

// shorten keeps the end of a dialogue, where the fault mostly is.
func shorten(s string, whole bool) string {
	all := strings.Split(s, "\n")
	const most = 60
	if whole || len(all) <= most {
		return s
	}
	return fmt.Sprintf("(%d lines before these)\n", len(all)-most) + strings.Join(all[len(all)-most:], "\n")
}
