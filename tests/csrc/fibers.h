/* Threads of a GPU on a CPU: every one a fiber that runs until it waits for others, then a fiber drawn at random goes
 * on.
 *
 * Barriers, exchanges between lanes and waits on memory are the only places where fibers change, and any order of them
 * may come: what needs a barrier that is not there is found by reading what was not written yet. */
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <vector>

class Fibers {
public:
    using Waiting = std::vector<size_t>; /* fibers by their number */

    /* Odd seeds mostly let those go on who could last, so that a warp runs ahead of others as far as it may. */
    explicit Fibers(uint32_t seed) : random_(seed + 1), ahead_(seed % 2) {}

    void add(std::function<void()> body) {
        ready_.push_back(fibers_.size());
        fibers_.push_back(std::make_unique<Fiber>());
        fibers_.back()->body = std::move(body);
        fibers_.back()->stack.reset(new char[STACK]);
    }

    /* Runs all to their end. False: what is left waits for what never comes. */
    bool run() {
        for (uint32_t count = 0; !fibers_.empty(); ++count) {
            if (ready_.empty() || count % 256 == 0) look();
            if (ready_.empty()) break;
            if (!ahead_ || random_() % 1024 == 0) std::swap(ready_[random_() % ready_.size()], ready_.back());
            current_ = ready_.back();
            ready_.pop_back();
            resume(*fibers_[current_]);
        }
        for (const auto &fiber : fibers_)
            if (!fiber->done) return false;
        return true;
    }

    /* The running fiber waits until another one calls wake with the same list. */
    void wait(Waiting &list) {
        list.push_back(current_);
        leave();
    }
    void wake(Waiting &list) {
        ready_.insert(ready_.end(), list.begin(), list.end());
        list.clear();
    }
    /* The running fiber waits until *place differs from `value` in a bit of `mask`. */
    void watch(const uint32_t *place, uint32_t value, uint32_t mask) {
        watches_.push_back({current_, place, value, mask});
        leave();
    }

private:
    static constexpr size_t STACK = 48 * 1024;
    struct Fiber {
        std::function<void()> body;
        std::unique_ptr<char[]> stack;
        ucontext_t context;
        jmp_buf at;
        bool started = false, done = false;
    };
    struct Watch {
        size_t fiber;
        const uint32_t *place;
        uint32_t value, mask;
    };

    void look() {
        for (size_t i = 0; i < watches_.size();) {
            const Watch watch = watches_[i];
            if (((*watch.place ^ watch.value) & watch.mask) == 0) {
                ++i;
                continue;
            }
            ready_.push_back(watch.fiber);
            watches_[i] = watches_.back();
            watches_.pop_back();
        }
    }
    void leave() {
        if (_setjmp(fibers_[current_]->at) == 0) _longjmp(scheduler_, 1);
    }
    void resume(Fiber &fiber) {
        if (_setjmp(scheduler_) != 0) return;
        if (fiber.started) _longjmp(fiber.at, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        const auto self = reinterpret_cast<uintptr_t>(this);
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 2, unsigned(self >> 32), unsigned(self));
        setcontext(&fiber.context);
    }
    static void enter(unsigned high, unsigned low) {
        auto *self = reinterpret_cast<Fibers *>(uintptr_t(high) << 32 | low);
        self->fibers_[self->current_]->body();
        self->fibers_[self->current_]->done = true;
        _longjmp(self->scheduler_, 1);
    }

    std::minstd_rand random_;
    bool ahead_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<size_t> ready_;
    std::vector<Watch> watches_;
    size_t current_ = 0;
    jmp_buf scheduler_;
};
