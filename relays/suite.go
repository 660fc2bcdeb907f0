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

// checkLimit is how long a check may take. The slowest, on the slowest relay, wait several seconds for an idle limit.
const checkLimit = 90 * time.Second

// A verdict is one cell of the table.
type verdict struct {
	relay, check string
	mode         string // byData or inChunks; "" if both are the same
	state        string // "ok", "FAIL" or "n.a."
	reason       string // why not "ok"
	dialogue     string
}

// runSuite runs the checks on each relay in turn and prints the results. It is the first process of its namespace: when it
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
			fmt.Printf("%s was not run, because it is unavailable: %s\n", f.Name, firstLine(f.Missing))
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
		fmt.Printf("  FAIL the relay does not run: %v\n", err)
		return []verdict{{relay: f.Name, check: "start", state: "FAIL", reason: err.Error()}}
	}
	defer r.stop()
	verdicts := []verdict{{relay: f.Name, check: "start", state: "ok"}}
	if r.habit, err = askAboutChunks(r); err != nil {
		return append(verdicts, verdict{relay: f.Name, check: "start", state: "FAIL", reason: "probe for refused chunks: " + err.Error()})
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

// lastLook compares once more at the end: this finds a relay that queues late what was sent before a break.
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
	go func() { // ends with the check; one that hangs is abandoned, and ends with the program
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
		err = fmt.Errorf("the check hangs:\n%s", buf[:runtime.Stack(buf, true)])
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

// shorten keeps the end of a dialogue, which usually contains the fault.
func shorten(s string, whole bool) string {
	all := strings.Split(s, "\n")
	const most = 60
	if whole || len(all) <= most {
		return s
	}
	return fmt.Sprintf("(%d earlier lines)\n", len(all)-most) + strings.Join(all[len(all)-most:], "\n")
}
